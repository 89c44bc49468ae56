"""Second derivatives: the diagonal of the Hessian, estimated by random probes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from hfprune.criteria.calibration.running import Calibration, accumulate, differentiable, twice_differentiable, zeros


def signs(shape: torch.Size, generator: torch.Generator, like: torch.Tensor) -> torch.Tensor:
    """A probe: every element -1 or 1 with equal chance."""
    return torch.randint(0, 2, shape, generator=generator, device=generator.device).mul_(2).sub_(1).to(like)


def curvature(calibration: Calibration, probes: int) -> dict[str, torch.Tensor]:
    """The diagonal of the loss's Hessian, averaged over batches and processes: E[v ⊙ Hv], v of random signs.

    The estimate (Hutchinson 1990; Bekas 2007) is without bias; its variance is the sum of the squares of the Hessian's
    row beside the diagonal, over the number of probes. It is exact where the Hessian is diagonal.

    Args:
        calibration: the model, its weights and batches.
        probes: how many v are drawn for every batch. Each costs about two backward passes.
    """
    parameters = calibration.parameters
    sums = [zeros(p.shape, p) for p in parameters]
    reached = torch.zeros(len(parameters), device=calibration.device)
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    generator = torch.Generator(calibration.device).manual_seed((calibration.seed + 7919 * rank) % 2**32)

    def add(batch: Any, number: int) -> int:
        loss = calibration.loss_on(batch, number)
        slopes = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        for index, slope in enumerate(slopes):
            reached[index] += slope is not None
        for _ in range(probes):
            drawn = [signs(p.shape, generator, p) for p in parameters]
            curved = [(s, v) for s, v in zip(slopes, drawn, strict=True) if s is not None and s.requires_grad]
            if not curved:  # a loss that is linear in the weights
                break
            found = torch.autograd.grad(
                [s for s, _ in curved], parameters, [v for _, v in curved], retain_graph=True, allow_unused=True
            )
            for total, value, v in zip(sums, found, drawn, strict=True):
                if value is not None:
                    total += (value * v).to(total.dtype) / probes
        return 1

    with differentiable(calibration.model, parameters), twice_differentiable():
        seen = accumulate(calibration, "second derivatives", add, [*sums, reached])
    return {name: total / seen for name, total, r in zip(calibration.weights, sums, reached.tolist(), strict=True) if r}
