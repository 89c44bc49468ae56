"""Distillation: the dense model, kept as it was, teaches the pruned one through the loss."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hfprune.config import Distillation
from hfprune.errors import ConfigError
from hfprune.profiling import human_bytes
from hfprune.training.checkpoints.resume import ResumableTrainer


class Teacher:
    """A frozen copy of a model in evaluation mode.

    It takes as much memory as the model's weights, and that of a forward pass without gradients; nothing of the
    optimizer's. In several processes each has a whole copy.

    Args:
        model: the dense model; it is copied.
        settings: temperature and alpha.
    """

    def __init__(self, model: nn.Module, settings: Distillation):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.settings = settings
        self.digest = digest_of(self.model)

    def words(self) -> str:
        """What it is and takes, for a person."""
        total = sum(value.nbytes for value in self.model.state_dict().values() if isinstance(value, torch.Tensor))
        settings = self.settings
        return (
            f"distilling from the dense model: temperature {settings.temperature:g}, alpha {settings.alpha:g}; "
            f"its copy takes {human_bytes(total)} of memory"
        )


class DistillingTrainer(ResumableTrainer):
    """A trainer whose training loss is, where it has a teacher, partly the distance to what the teacher answers.

    Evaluation measures the loss of the labels alone.
    """

    teacher: Teacher | None = None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        given = dict(inputs)  # Trainer takes the labels out of its own for some losses
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        with torch.no_grad(), self.accelerator.autocast():
            taught = self._answers(given)
        settings = self.teacher.settings
        said, labels, shift = _logits(outputs), given.get(self._label), self._loss_shifts_labels
        rows = divergences(said, taught, settings.temperature, labels, shift=shift)
        distance = self._reduced(rows, kwargs.get("num_items_in_batch"))
        loss = (1 - settings.alpha) * loss + settings.alpha * settings.temperature**2 * distance.to(loss.dtype)
        return (loss, outputs) if return_outputs else loss

    def begin_teaching(self, settings: Distillation) -> None:
        """Makes the model as it is the teacher, unless there is one from the training before, and tries it on a row.

        Raises:
            ConfigError: it gives no class probabilities that could be compared.
        """
        if self.teacher is None:
            self.teacher = Teacher(self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False), settings)
        if self.train_dataset is None:
            return
        rows = self.train_dataset
        row = rows[0] if hasattr(rows, "__getitem__") else next(iter(rows))
        collate = self._get_collator_with_removed_columns(self.data_collator, description="example")
        batch = self._prepare_inputs(collate([row]))
        with torch.no_grad(), self.accelerator.autocast():
            answers = self._answers(batch)
        divergences(answers, answers, 1.0, batch.get(self._label), shift=self._loss_shifts_labels)

    @property
    def _label(self) -> str:
        return next(iter(self.label_names or ()), "labels")

    def _answers(self, inputs: dict[str, Any]) -> torch.Tensor:
        """The teacher's logits."""
        if not self.plain_module:
            return _logits(self.teacher.model(**inputs))
        given = {name: value for name, value in inputs.items() if name not in self.label_names}
        output = self.teacher.model(*given.values()) if len(given) == 1 else self.teacher.model(**given)
        return output if isinstance(output, torch.Tensor) else output[0]

    def _reduced(self, rows: torch.Tensor, items: torch.Tensor | int | None) -> torch.Tensor:
        """The mean over rows, scaled as Trainer scales the task's loss over accumulated batches and processes."""
        if items is None or not (self.model_accepts_loss_kwargs or self.compute_loss_func):
            return rows.sum() / max(1, rows.numel())
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return rows.sum() / items * processes


def divergences(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, labels: torch.Tensor | None, shift: bool
) -> torch.Tensor:
    """KL(teacher || student) of the class probabilities at a temperature, where there is something to predict.

    Args:
        student, teacher: logits, classes in the last dimension, or in dimension 1 of maps.
        temperature: what both are divided by.
        labels: class numbers; -100 leaves a place out.
        shift: whether each place predicts the label of the next one, as in causal language models.

    Returns:
        One value a place that counts, shape (places,).

    Raises:
        ConfigError: the logits are no scores of classes.
    """
    of_classes = labels is None or not labels.is_floating_point()
    if student.shape != teacher.shape or student.ndim < 2 or student.shape[-1] < 2 or not of_classes:
        raise ConfigError("pruning.recovery.distill: compares class probabilities, and this model gives none")
    if labels is not None and labels.shape != student.shape[:-1] and labels.shape[1:] == student.shape[2:]:
        student, teacher = student.movedim(1, -1), teacher.movedim(1, -1)
    if labels is not None and shift:
        student, teacher, labels = student[..., :-1, :], teacher[..., :-1, :], labels[..., 1:]
    says, taught = (torch.log_softmax(logits.float() / temperature, -1) for logits in (student, teacher))
    rows = (taught.exp() * (taught - says)).sum(-1)
    return rows.flatten() if labels is None else rows[labels.reshape(rows.shape) != -100]


def digest_of(model: nn.Module) -> str:
    """A hash of all tensors of a model, by name."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _logits(outputs: Any) -> torch.Tensor:
    if not isinstance(outputs, Mapping) or not isinstance(outputs.get("logits"), torch.Tensor):
        raise ConfigError("pruning.recovery.distill: compares logits, and this model returns none by that name")
    return outputs["logits"]
