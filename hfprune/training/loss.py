"""LossTrainer: a Trainer that also trains plain modules, which take inputs and return logits."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from hfprune.criteria.calibration import loss_from
from hfprune.errors import ConfigError
from hfprune.training.recognition import RecognisingTrainer


class LossTrainer(RecognisingTrainer):
    """Trainer that computes the loss where the model does not, and never changes the arguments it is given."""

    def __init__(
        self, model: nn.Module | None = None, args: TrainingArguments | None = None, *others: Any, **kwargs: Any
    ):
        args = copy.copy(args) if args is not None else TrainingArguments(output_dir="tmp_trainer")
        self.plain_module = isinstance(model, nn.Module) and takes_no_labels(model)
        if self.plain_module:
            # The names of the inputs are the module's own affair: they are passed by position.
            args.remove_unused_columns = False
            args.label_names = args.label_names or ["labels"]
            if args.label_smoothing_factor:
                kind = type(model).__name__
                raise ConfigError(f"training.label_smoothing_factor: needs a model that has a config; {kind} has none")
        super().__init__(model, args, *others, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        if not self.plain_module or self.compute_loss_func is not None:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        inputs = dict(inputs)
        labels = inputs.pop(self.label_names[0], None)
        output = model(*inputs.values()) if len(inputs) == 1 else model(**inputs)
        logits = output if isinstance(output, torch.Tensor) else output[0]
        loss = loss_from(logits, labels) if labels is not None else logits.sum() * math.nan
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss


def takes_no_labels(model: nn.Module) -> bool:
    """Whether a module only maps inputs to outputs."""
    if isinstance(model, PreTrainedModel) or hasattr(model, "peft_config"):
        return False
    return not any(name.startswith("label") for name in inspect.signature(model.forward).parameters)
