"""First derivatives: the gradient averaged over batches, its squares averaged over single samples."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from hfprune.criteria.calibration.batches import FORWARD_FAILURES, LossFunction, default_loss
from hfprune.criteria.calibration.running import Calibration, accumulate, differentiable, zeros
from hfprune.criteria.calibration.shards import sharded_gradient
from hfprune.errors import DataError, HfpruneError, ModelError
from hfprune.sharding import is_sharded
from hfprune.weights import Weight

VMAP_ELEMENTS = 1 << 27
"""So many gradient elements (half a gigabyte in single precision) may be held at once."""

_LEAST_SAMPLES = 4
"""With fewer samples at once, one at a time is no slower."""


def mean_gradients(
    model: nn.Module, weights: dict[str, Weight], data: Any, batches: int, loss: LossFunction
) -> dict[str, torch.Tensor]:
    """The gradient of the loss for every weight, averaged over batches and all processes, in float32."""
    found = gradient(Calibration(model, weights, data, batches, loss))
    return {name: found.get(name, zeros(w.parameter.shape, w.parameter)) for name, w in weights.items()}


def gradient(calibration: Calibration) -> dict[str, torch.Tensor]:
    """The gradient of the loss, averaged over batches and all processes; weights that took no part are left out."""
    parameters = calibration.parameters
    if any(is_sharded(parameter) for parameter in parameters):
        return sharded_gradient(calibration)
    sums: list[torch.Tensor | None] = [None] * len(parameters)
    added = [0] * len(parameters)
    reached = torch.zeros(len(parameters), device=calibration.device)

    def add(batch: Any, number: int) -> int:
        found = torch.autograd.grad(calibration.loss_on(batch, number), parameters, allow_unused=True)
        for index, value in enumerate(found):
            if value is None:
                continue
            if sums[index] is None:  # autograd's own tensor, which others may share: it is not written to
                sums[index] = value.to(torch.promote_types(value.dtype, torch.float32))
            elif added[index] == 1:
                sums[index] = sums[index] + value
            else:
                sums[index] += value
            added[index] += 1
            reached[index] = 1
        return 1

    def owned() -> Iterator[torch.Tensor]:
        for index, parameter in enumerate(parameters):
            sums[index] = zeros(parameter.shape, parameter) if sums[index] is None else sums[index].clone()
            yield sums[index]
        yield reached

    with differentiable(calibration.model, parameters):
        seen = accumulate(calibration, "gradients", add, owned())
    present = zip(calibration.weights, sums, reached.tolist(), strict=True)
    return {name: total / seen if seen > 1 else total for name, total, r in present if r}


def squared_gradient(calibration: Calibration) -> dict[str, torch.Tensor]:
    """E[g²] over single samples, not over batches: the diagonal of the empirical Fisher matrix.

    Samples are taken many at once (`torch.func.vmap`) where the model lets it and the result is the same; a model whose
    code looks at values, or keeps its weights in places of its own, takes them one by one.
    """
    parameters = calibration.parameters
    sums = [zeros(p.shape, p) for p in parameters]
    reached = torch.zeros(len(parameters), device=calibration.device)
    samples = _Samples(calibration, sums, reached)
    with differentiable(calibration.model, parameters):
        seen = accumulate(calibration, "gradients of single samples", samples.add, [*sums, reached])
    return {name: total / seen for name, total, r in zip(calibration.weights, sums, reached.tolist(), strict=True) if r}


class _Samples:
    """Adds up squared gradients of single samples."""

    def __init__(self, calibration: Calibration, sums: list[torch.Tensor], reached: torch.Tensor):
        self.calibration, self.sums, self.reached = calibration, sums, reached
        elements = sum(p.numel() for p in calibration.parameters)
        self.at_once = max(1, VMAP_ELEMENTS // max(1, elements))
        self.vectorised = self.at_once >= _LEAST_SAMPLES

    def add(self, batch: Any, number: int) -> int:
        parts, spec = tree_flatten(batch)
        first = next((part for part in parts if isinstance(part, torch.Tensor) and part.ndim), None)
        if first is None or not len(first):
            raise DataError(f"calibration batch {number}: no tensor with samples along its first dimension was found")
        own = [isinstance(part, torch.Tensor) and part.ndim > 0 and len(part) == len(first) for part in parts]
        start = self._one(parts, spec, own, 0, number)
        if self.vectorised and len(first) >= _LEAST_SAMPLES:
            self.vectorised = self._many(parts, spec, own, number, start)
        if not self.vectorised or len(first) < _LEAST_SAMPLES:
            self._add(start)
            for index in range(1, len(first)):
                self._add(self._one(parts, spec, own, index, number))
        return len(first)

    def _one(self, parts: list[Any], spec: Any, own: list[bool], index: int, number: int) -> list[torch.Tensor | None]:
        """The gradients of one sample."""
        one = [part[index : index + 1] if is_own else part for part, is_own in zip(parts, own, strict=True)]
        loss = self.calibration.loss_on(tree_unflatten(one, spec), number)
        return list(torch.autograd.grad(loss, self.calibration.parameters, allow_unused=True))

    def _add(self, gradients: list[torch.Tensor | None]) -> None:
        for index, value in enumerate(gradients):
            if value is not None:
                self.sums[index] += value.to(self.sums[index].dtype).square()
                self.reached[index] = 1

    def _many(
        self, parts: list[Any], spec: Any, own: list[bool], number: int, start: list[torch.Tensor | None]
    ) -> bool:
        """Adds the whole batch up, many samples at once; False, and nothing added, where that is not possible.

        The gradients of the first sample, computed the plain way, must come out.
        """
        names, loss = list(self.calibration.weights), self.calibration.loss or default_loss
        owner = _WithLoss(self.calibration.model, loss)
        values = {f"model.{name}": p.detach() for name, p in zip(names, self.calibration.parameters, strict=True)}

        def of_one(values: dict[str, torch.Tensor], *sample: torch.Tensor) -> torch.Tensor:
            left = iter(sample)
            one = [next(left)[None] if is_own else part for part, is_own in zip(parts, own, strict=True)]
            return functional_call(owner, values, (tree_unflatten(one, spec),)).reshape(())

        samples = [part for part, is_own in zip(parts, own, strict=True) if is_own]
        added = [torch.zeros_like(total) for total in self.sums]
        try:
            with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
                warnings.simplefilter("ignore")  # of operations that vmap takes one by one
                together = vmap(grad(of_one), in_dims=(None, *(0 for _ in samples)))
                for begin in range(0, len(samples[0]), self.at_once):
                    found = together(values, *(sample[begin : begin + self.at_once] for sample in samples))
                    gradients = [found[f"model.{name}"] for name in names]
                    if begin == 0 and not all(map(_alike, gradients, start)):
                        return False
                    for total, value in zip(added, gradients, strict=True):
                        total += value.detach().to(total.dtype).square().sum(0)
        except (*FORWARD_FAILURES, HfpruneError):
            return False
        if not all(bool(torch.isfinite(total).all()) for total in added):
            raise ModelError(f"the gradients on calibration batch {number} are not finite; nothing was pruned")
        for index, total in enumerate(added):
            self.sums[index] += total
            self.reached[index] += start[index] is not None
        return True


class _WithLoss(nn.Module):
    """A model and its loss as one module, so that a call can be made with other values for its parameters."""

    def __init__(self, model: nn.Module, loss: LossFunction):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> torch.Tensor:
        return self.loss(self.model, batch)


def _alike(many: torch.Tensor, one: torch.Tensor | None) -> bool:
    """Whether the first of many gradients is the one computed alone, as far as the precision tells."""
    first = many[0].float()
    one = torch.zeros_like(first) if one is None else one.float()
    allowed = 0.05 if many.dtype in (torch.float16, torch.bfloat16) else 1e-3
    return float((first - one).norm()) <= allowed * float(one.norm()) + 1e-12
