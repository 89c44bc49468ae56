"""Criteria of second order: obd, fisher."""

from __future__ import annotations

from typing import Any

import torch

from hfprune.criteria.criterion import Criterion, count, register_criterion


@register_criterion("obd")
class Obd(Criterion):
    """Σ ½ w² h, h the diagonal of the loss's Hessian (Optimal Brain Damage, LeCun 1989).

    h is an estimate without bias from `probes` random vectors a batch (Hutchinson); it may be negative.
    """

    statistics = ("curvature",)

    def __init__(self, *, probes: int = 8, **common: Any):
        super().__init__(**common)
        self.probes = count("probes", probes)

    def terms(self, name: str, weight: torch.Tensor, curvature: torch.Tensor) -> torch.Tensor:
        return 0.5 * weight.square() * curvature


@register_criterion("fisher")
class Fisher(Criterion):
    """Σ ½ w² E[g²], with gradients of single samples (Theis 2018, arXiv 1801.05787; WoodFisher, arXiv 2004.14340)."""

    statistics = ("squared_gradient",)

    def terms(self, name: str, weight: torch.Tensor, squared_gradient: torch.Tensor) -> torch.Tensor:
        return 0.5 * weight.square() * squared_gradient
