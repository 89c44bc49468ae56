"""RecognisingTrainer: a Trainer that evaluates recognisers, and other models that generate, by what they write."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from hfprune.speech.recognisers import without_padding


class RecognisingTrainer(Trainer):
    """Trainer whose evaluations look at what is generated, as `Seq2SeqTrainer`'s do, where the arguments are
    `Seq2SeqTrainingArguments` with `predict_with_generate`; all others are Trainer's own."""

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """One batch: its loss, the tokens that are generated (batch, tokens), or else the logits, and its labels."""
        whole = self.accelerator.unwrap_model(model)
        wanted = getattr(self.args, "predict_with_generate", False) and not prediction_loss_only
        if not wanted or not hasattr(whole, "can_generate") or not whole.can_generate():
            loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            return loss, _blank_where_padded(whole, logits, inputs), labels
        inputs = self._prepare_inputs(inputs)
        loss, _, labels = super().prediction_step(model, inputs, True, ignore_keys)
        labels = inputs.get("labels") if labels is None else labels
        heard = {name: value for name, value in inputs.items() if name not in ("labels", "decoder_input_ids")}
        with torch.no_grad(), self.compute_loss_context_manager():
            tokens = whole.generate(**heard, **self._generation(labels))
        return loss, tokens, labels

    def _generation(self, labels: torch.Tensor | None) -> dict[str, Any]:
        args = self.args
        wanted = {"max_length": args.generation_max_length, "num_beams": args.generation_num_beams}
        return {name: value for name, value in wanted.items() if value is not None}


def _blank_where_padded(model: nn.Module, logits: Any, inputs: dict[str, Any]) -> Any:
    if isinstance(logits, torch.Tensor):
        return without_padding(model, logits, inputs)
    return logits
