"""RecognisingTrainer: a Trainer that evaluates recognisers, and other models that generate, by what they write."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from hfprune.speech.recognisers import generated, kind_of, without_padding


class RecognisingTrainer(Trainer):
    """Trainer whose evaluations look at what is generated, as `Seq2SeqTrainer`'s do, where the arguments are
    `Seq2SeqTrainingArguments` with `predict_with_generate`; all others are Trainer's own."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if kind_of(self.accelerator.unwrap_model(self.model)) is not None:
            # Recognisers take the number of labels and don't divide by it; Trainer would leave the mean to them.
            self.model_accepts_loss_kwargs = False

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """One batch: its loss, the tokens that are generated (batch, tokens), or else the logits, and its labels."""
        whole, args = self.accelerator.unwrap_model(model), self.args
        wanted = getattr(args, "predict_with_generate", False) and not prediction_loss_only
        if not wanted or not hasattr(whole, "can_generate") or not whole.can_generate():
            loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            if isinstance(logits, torch.Tensor):
                logits = without_padding(whole, logits, inputs)
            return loss, logits, labels
        inputs = self._prepare_inputs(inputs)
        loss = super().prediction_step(model, inputs, True, ignore_keys)[0]
        options = {"max_length": args.generation_max_length, "num_beams": args.generation_num_beams}
        # Where the parts of a model lie in several processes, all must write for as long as one of them does.
        options["synced_gpus"] = True if self.is_fsdp_enabled and args.world_size > 1 else None
        with self.compute_loss_context_manager():
            return loss, generated(whole, inputs, **options), inputs.get("labels")
