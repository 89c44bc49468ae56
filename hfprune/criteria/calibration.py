"""Calibration: batches run through the model to feed data-driven criteria; sums are reduced over all processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hfprune.criteria.criterion import Criterion
from hfprune.errors import ConfigError, DataError, ModelError
from hfprune.weights import Weight

LossFunction = Callable[[nn.Module, Any], torch.Tensor]


def gather(
    criterion: Criterion,
    model: nn.Module,
    weights: dict[str, Weight],
    data: Any = None,
    *,
    loss: LossFunction | None = None,
    history: dict[str, torch.Tensor] | None = None,
) -> dict[str, tuple[torch.Tensor, ...]]:
    """The statistics that a criterion asks for, by weight name; the model is left as it was.

    Args:
        criterion: says what it needs.
        model: run in evaluation mode, so that neither dropout nor running statistics take part.
        weights: those to be scored.
        data: a batch or an iterable of batches (`batches_of`).
        loss: from the model and a batch to a scalar; by default the model's own (`default_loss`).
        history: sums of weight times gradient from training, where there are any.

    Raises:
        ConfigError: the criterion needs data and there is none.
        ModelError: the model can't take a batch, or the loss is not finite.
    """
    if not criterion.statistics:
        return {name: () for name in weights}
    found: dict[str, dict[str, torch.Tensor]] = {}
    if "movement" in criterion.statistics and history:
        found["movement"] = history
    if set(criterion.statistics) - set(found):
        if data is None:
            name = type(criterion).__name__.lower()
            raise ConfigError(f"pruning.criterion: '{name}' scores by gradients and needs data; give data, or use 'l1'")
        gradients = mean_gradients(model, weights, data, criterion.batches, loss or default_loss)
        found["gradient"] = gradients
        if "movement" in criterion.statistics and "movement" not in found:
            found["movement"] = {n: weights[n].parameter.detach() * g for n, g in gradients.items()}
    return {name: tuple(found[s][name] for s in criterion.statistics) for name in weights}


def mean_gradients(
    model: nn.Module, weights: dict[str, Weight], data: Any, batches: int, loss: LossFunction
) -> dict[str, torch.Tensor]:
    """The gradient of the loss for every weight, averaged over batches and all processes, in float32."""
    parameters = [weight.parameter for weight in weights.values()]
    sums = [
        torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device) for p in parameters
    ]
    seen = 0
    with _differentiable(model, parameters):
        for batch in itertools.islice(batches_of(data), batches):
            value = _usable(loss(model, to_device(batch, parameters[0].device)), seen + 1)
            for total, gradient in zip(sums, torch.autograd.grad(value, parameters, allow_unused=True), strict=True):
                if gradient is not None:
                    total += gradient
            seen += 1
    if dist.is_available() and dist.is_initialized():
        counted = torch.tensor(float(seen), device=parameters[0].device)
        for tensor in (*sums, counted):
            dist.all_reduce(tensor)
        seen = int(counted)
    if not seen:
        raise DataError("the calibration data holds no batch")
    return {name: total / seen for name, total in zip(weights, sums, strict=True)}


def _usable(loss: Any, number: int) -> torch.Tensor:
    """The loss on a batch, if it is one finite number that a gradient can be taken of."""
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise ModelError(f"the loss on calibration batch {number} must be one number that depends on the weights")
    if not torch.isfinite(loss):
        raise ModelError(f"the loss on calibration batch {number} is {loss.item()}; nothing was pruned")
    return loss


@contextmanager
def _differentiable(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """The model in evaluation mode with gradients for the parameters; all is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    frozen = [p for p in parameters if not p.requires_grad]
    model.eval()
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, mode in modes:
            module.training = mode


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
    labels = None
    try:
        if isinstance(batch, Mapping):
            output = model(**batch)
        elif isinstance(batch, list | tuple):
            labels = batch[1] if len(batch) > 1 else None
            output = model(**batch[0]) if isinstance(batch[0], Mapping) else model(batch[0])
        else:
            output = model(batch)
        own = output.get("loss") if isinstance(output, Mapping) else None
        if own is not None and labels is None:
            return own.mean()
        if labels is not None:
            return loss_from(output, labels)
    except (TypeError, RuntimeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        reason = str(error).strip() or type(error).__name__
        raise ModelError(f"the model can't take the batch: {reason.splitlines()[0]}") from error
    raise DataError("data: no loss can be computed; give pairs (inputs, labels), or maps with labels")


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
