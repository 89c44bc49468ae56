"""Batches: the forms that calibration data may take, and how a model runs on one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from hfprune.errors import DataError, ModelError

LossFunction = Callable[[nn.Module, Any], torch.Tensor]

FORWARD_FAILURES = (TypeError, RuntimeError, ValueError, LookupError, AttributeError, AssertionError)
"""What a model that can't take a batch may raise."""


def batches_of(data: Any) -> Iterator[Any]:
    """Batches one by one: a tensor, a map or a pair `(inputs, labels)` is one batch, anything else holds many."""
    if isinstance(data, torch.Tensor | Mapping) or _is_pair(data):
        yield data
    elif isinstance(data, Iterable):
        yield from data
    else:
        raise DataError(f"data: expected a batch or an iterable of batches, not {type(data).__name__}")


def _is_pair(data: Any) -> bool:
    return isinstance(data, tuple) and bool(data) and all(isinstance(part, torch.Tensor | Mapping) for part in data)


def example_inputs_of(data: Any) -> Any:
    """What a model takes, from the first batch of calibration data and without labels; None where that can't be said.

    An iterator is not touched, since what is taken from it is lost.
    """
    if data is None or hasattr(data, "__next__"):
        return None
    batch = next(batches_of(data), None)
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in ("labels", "label")}
    return batch[0] if _is_pair(batch) else batch


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on the device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        parts = [to_device(part, device) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def default_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """The model's own loss where its output has one; else cross entropy for integer labels, squared error for others.

    Raises:
        ModelError: the model can't take the batch, or there are no labels to compute a loss with.
    """
    output, labels = _answer(model, batch)
    try:
        own = output.get("loss") if isinstance(output, Mapping) else None
        if own is not None and labels is None:
            return own.mean()
        if labels is not None:
            return loss_from(output, labels)
    except FORWARD_FAILURES as error:
        raise _refusal(error) from error
    raise DataError("data: no loss can be computed; give pairs (inputs, labels), or maps with labels")


def run_forward(model: nn.Module, batch: Any) -> None:
    """One forward pass on a batch, whose labels, if any, need not serve for a loss.

    Raises:
        ModelError: the model can't take the batch.
    """
    _answer(model, batch)


def _answer(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """What the model answers to a batch, and the labels that stand beside the inputs."""
    labels = None
    try:
        if isinstance(batch, Mapping):
            return model(**batch), None
        if isinstance(batch, list | tuple):
            labels = batch[1] if len(batch) > 1 else None
            return (model(**batch[0]) if isinstance(batch[0], Mapping) else model(batch[0])), labels
        return model(batch), None
    except FORWARD_FAILURES as error:
        raise _refusal(error) from error


def _refusal(error: BaseException) -> ModelError:
    reason = str(error).strip() or type(error).__name__
    return ModelError(f"the model can't take the batch: {reason.splitlines()[0]}")


def loss_from(output: Any, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy for integer labels (classes in the last dimension, or dimension 1 of maps), else squared error."""
    if isinstance(output, Mapping):
        output = output["logits"] if "logits" in output else next(iter(output.values()))
    elif isinstance(output, list | tuple):
        output = output[0]
    if labels.is_floating_point():
        return nn.functional.mse_loss(output.squeeze(-1) if output.ndim == labels.ndim + 1 else output, labels)
    if output.ndim == labels.ndim + 1 and output.shape[:-1] == labels.shape:
        return nn.functional.cross_entropy(output.flatten(0, -2), labels.flatten())
    return nn.functional.cross_entropy(output, labels)
