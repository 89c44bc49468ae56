"""Criteria of distances between the units of a layer: fpgm, fermat."""

from __future__ import annotations

import torch

from hfprune.criteria.criterion import Criterion, register_criterion

_BLOCK = 256
"""Distances are computed in blocks of so many points: they stay in the cache, and half of them are enough."""

_ROUNDS = 200
"""Weiszfeld's iteration converges in a few dozen rounds; this bounds it."""


@register_criterion("fpgm")
class Fpgm(Criterion):
    """Σ_j ||w_i - w_j||₂ over the units of the layer: those nearest to all others go (He 2019, arXiv 1811.00250)."""

    of_units = True

    def units(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return distance_sums(weight)


@register_criterion("fermat")
class Fermat(Criterion):
    """The distance to the geometric median of the layer's units (Huang 2021, arXiv 2004.11627)."""

    of_units = True

    def units(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(weight - geometric_median(weight), dim=1)


def distance_sums(points: torch.Tensor) -> torch.Tensor:
    """The sum of each point's distances to all others.

    Args:
        points: shape (points, dimensions).

    Returns:
        Shape (points,).
    """
    points = points - points.mean(0)  # the distances stay, and the products lose less in single precision
    squares = points.square().sum(1)
    sums = torch.zeros_like(squares)
    for top in range(0, len(points), _BLOCK):
        rows = slice(top, top + _BLOCK)
        for left in range(top, len(points), _BLOCK):  # the other half is the same
            columns = slice(left, left + _BLOCK)
            block = squares[rows, None] + squares[columns]
            block.addmm_(points[rows], points[columns].T, alpha=-2)
            if top == left:
                block.fill_diagonal_(0)
            block.clamp_min_(0).sqrt_()
            sums[rows] += block.sum(1)
            if left > top:
                sums[columns] += block.sum(0)
    return sums


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
