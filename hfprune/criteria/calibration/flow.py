"""Synaptic flow: what every weight passes on of an input of ones, in the network of absolute weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from hfprune.criteria.calibration.batches import FORWARD_FAILURES
from hfprune.criteria.calibration.running import Calibration, differentiable
from hfprune.errors import ModelError


def synaptic_flow(calibration: Calibration) -> dict[str, torch.Tensor]:
    """dR/d|w|, R the sum of the outputs of the network with |w| on an input of ones (Tanaka 2020, arXiv 2006.05467).

    It runs in double precision, where the products of hundreds of layers don't overflow; a model that insists on
    another precision runs in single. Floating-point inputs are ones; a look-up of tokens gives what ones for all tokens
    would: the sum of the table. Of buffers the running means are zero, so that a norm only scales; others, such as
    masks and tables of positions, stay what they are. Dropout is off.

    Raises:
        ModelError: the model can't run so, or the flow overflows.
    """
    error: BaseException | None = None
    for dtype in (torch.float64, torch.float32):
        try:
            return _flow(calibration, dtype)
        except FORWARD_FAILURES as failure:
            error = error or failure
    reason = str(error).strip().splitlines() or [type(error).__name__]
    raise ModelError(f"the model can't run on inputs of ones: {reason[0]}") from error


def _flow(calibration: Calibration, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    parameters = calibration.parameters
    args, kwargs = tree_map(lambda value: _ones(value, dtype), calibration.example_inputs)
    with _absolute(calibration.model, dtype), differentiable(calibration.model, parameters):
        output = calibration.model(*args, **kwargs)
        total = sum(value.sum() for value in _outputs(output))
        found = torch.autograd.grad(total, parameters, allow_unused=True)
    if not torch.isfinite(total):
        raise ModelError(f"the synaptic flow is {float(total)}: it overflows {dtype}".replace("torch.", ""))
    return {name: value for name, value in zip(calibration.weights, found, strict=True) if value is not None}


def _ones(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return torch.ones_like(value, dtype=dtype)
    return value


def _outputs(output: Any) -> list[torch.Tensor]:
    """The model's answer: logits where it names them, else its first output."""
    if isinstance(output, dict) and "logits" in output:
        return [output["logits"]]
    leaves = tree_leaves(tuple(output.values()) if isinstance(output, dict) else output)
    found = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    return found[:1]


@contextmanager
def _absolute(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The model with absolute weights of another precision; its own tensors are put back untouched."""
    parameters = [(parameter, parameter.data) for parameter in model.parameters()]
    buffers = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    hooks = [m.register_forward_hook(lambda m, _, out: m.weight.sum(0).expand_as(out)) for m in tables]
    try:
        for parameter, value in parameters:
            if value.is_floating_point():
                parameter.data = value.abs().to(dtype)
        for module, name, buffer in buffers:
            if buffer.is_floating_point():
                value = torch.zeros_like(buffer) if name == "running_mean" else buffer
                module._buffers[name] = value.to(dtype)
        yield
    finally:
        for parameter, value in parameters:
            parameter.data = value
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        for hook in hooks:
            hook.remove()
