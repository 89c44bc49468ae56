"""Criteria of distances between the units of a layer: fpgm, fermat."""

from __future__ import annotations

import torch

from hfprune.criteria.criterion import Criterion, register_criterion

_ROUNDS = 200
"""Weiszfeld's iteration converges in a few dozen rounds; this bounds it."""


@register_criterion("fpgm")
class Fpgm(Criterion):
    """Σ_j ||w_i - w_j||₂ over the units of the layer: those nearest to all others go (He 2019, arXiv 1811.00250)."""

    of_units = True

    def units(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        # Distances are those of the centred units, whose products lose less in single precision.
        centred = weight - weight.mean(0)
        return torch.cdist(centred, centred).sum(1)


@register_criterion("fermat")
class Fermat(Criterion):
    """The distance to the geometric median of the layer's units (Huang 2021, arXiv 2004.11627)."""

    of_units = True

    def units(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(weight - geometric_median(weight), dim=1)


def geometric_median(points: torch.Tensor) -> torch.Tensor:
    """The point with the least sum of distances to all, by Weiszfeld's iteration.

    Where it meets one of the points, it goes on as Vardi & Zhang (2000) have it.

    Args:
        points: shape (points, dimensions).

    Returns:
        Shape (dimensions,).
    """
    median = points.mean(0)
    tolerance = 4 * torch.finfo(points.dtype).eps
    scale = torch.linalg.vector_norm(points - median, dim=1).max()
    for _ in range(_ROUNDS):
        distances = torch.linalg.vector_norm(points - median, dim=1)
        met = distances <= tolerance * scale
        weights = torch.where(met, 0.0, 1 / distances.clamp_min(torch.finfo(points.dtype).tiny))
        total = weights.sum()
        if not total > 0:  # all points are one
            return median
        towards = weights @ points / total
        held = met.sum()
        if held:
            pull = torch.linalg.vector_norm(towards - median) * total
            towards = median + (towards - median) * (1 - held / pull.clamp_min(held)).clamp_min(0.0)
        moved = torch.linalg.vector_norm(towards - median)
        median = towards
        if moved <= tolerance * scale:
            break
    return median
