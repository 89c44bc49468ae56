"""Criteria that need no data: random, l1, l2, lamp, bn_scale."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from hfprune.criteria.criterion import Criterion, register_criterion


@register_criterion("random")
class Random(Criterion):
    """Uniform in [0, 1), drawn by the seed and the layer's name, or the group's for its units: the baseline."""

    pointwise = False
    members = "none"
    scores_components = True

    def __init__(self, **common: Any):
        super().__init__(**common)
        self._generator = torch.Generator()

    def terms(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return self._drawn(name, weight.shape).to(weight.device)

    def units(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return self._drawn(name, weight.shape[:1])

    def _drawn(self, name: str, shape: torch.Size) -> torch.Tensor:
        # The CPU's generator looks at the low 32 bits of its seed alone.
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        return torch.rand(shape, generator=self._generator.manual_seed(int.from_bytes(digest[:4], "big")))


@register_criterion("l1")
class L1(Criterion):
    """Sum of |w| (Han 2015, Li 2017)."""

    scores_components = True

    def terms(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight.abs()


@register_criterion("l2")
class L2(Criterion):
    """Root of the sum of w² (Han 2015, Li 2017)."""

    scores_components = True

    def terms(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight.square()

    def finish(self, total: torch.Tensor) -> torch.Tensor:
        return total.sqrt()


@register_criterion("lamp")
class Lamp(Criterion):
    """w² over the sum of all w'² of the layer with |w'| >= |w| (Lee 2021, arXiv 2010.07611).

    The largest weight of a layer scores 1, whatever its size: a global ranking never empties a layer. A block of
    weights or a structural unit counts as one, with the sum of its squares; a whole residual block, which is alone in
    its list of weights, scores its mean square.
    """

    pointwise = False

    def terms(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight.square()

    def finish(self, total: torch.Tensor) -> torch.Tensor:
        if not total.ndim:
            return total
        squares = total.flatten().double()
        ordered = squares.sort().values
        at_least = ordered.flip(0).cumsum(0).flip(0)
        # Equal magnitudes share one denominator: the sum from the first of them on.
        places = torch.searchsorted(ordered, squares).clamp_max(max(0, len(ordered) - 1))  # nan lies behind all
        scores = torch.where(squares == 0, 0.0, squares / at_least[places]).view(total.shape)
        return scores.to(total.dtype)


@register_criterion("bn_scale")
class BnScale(Criterion):
    """Σ |γ| of the norms that follow the units' layers (Network Slimming, Liu 2017, arXiv 1708.06519)."""

    of_units = True
    members = "norms"

    def units(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight.abs().sum(1)
