"""Criteria that need no data: random, l1, l2, lamp, bn_scale."""

from __future__ import annotations

import hashlib

import torch

from hfprune.criteria.criterion import Criterion, register_criterion


@register_criterion("random")
class Random(Criterion):
    """Uniform in [0, 1), drawn by the seed and the layer's name: the baseline."""

    pointwise = False

    def terms(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        # The CPU's generator looks at the low 32 bits of its seed alone.
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        return torch.rand(weight.shape, generator=generator).to(weight.device)


@register_criterion("l1")
class L1(Criterion):
    """Sum of |w| (Han 2015, Li 2017)."""

    def terms(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight.abs()


@register_criterion("l2")
class L2(Criterion):
    """Root of the sum of w² (Han 2015, Li 2017)."""

    def terms(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight.square()

    def finish(self, total: torch.Tensor) -> torch.Tensor:
        return total.sqrt()


@register_criterion("lamp")
class Lamp(Criterion):
    """w² over the sum of all w'² of the layer with |w'| >= |w| (Lee 2021, arXiv 2010.07611).

    The largest weight of a layer scores 1, whatever its size: a global ranking never empties a layer.
    """

    pointwise = False

    def terms(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        squares = weight.flatten().double().square()
        ordered = squares.sort().values
        at_least = ordered.flip(0).cumsum(0).flip(0)
        # Equal magnitudes share one denominator: the sum from the first of them on.
        places = torch.searchsorted(ordered, squares).clamp_max(max(0, len(ordered) - 1))  # nan lies behind all
        scores = torch.where(squares == 0, 0.0, squares / at_least[places]).view(weight.shape)
        return scores if weight.dtype == torch.float64 else scores.float()


@register_criterion("bn_scale")
class BnScale(Criterion):
    """Σ |γ| of the norms that follow the units' layers (Network Slimming, Liu 2017, arXiv 1708.06519)."""

    of_units = True
    members = "norms"

    def units(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight.abs().sum(1)
