"""Criteria of the components of a factored weight: singular_value, whitening."""

from __future__ import annotations

from typing import Any

import torch

from hfprune.criteria.criterion import Criterion, register_criterion
from hfprune.errors import ConfigError


@register_criterion("singular_value")
class SingularValue(Criterion):
    """σ²: what the weight loses, in squared Frobenius norm, without the component (Eckart & Young 1936)."""

    scores_components = True
    of_components = True

    def terms(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight.square()


@register_criterion("whitening")
class Whitening(SingularValue):
    """σ² of the weight times a root of the inputs' second moment: what the layer's outputs lose, in squared norm over
    the calibration data, without the component (SVD-LLM, Wang 2024, arXiv 2403.07378).

    `damping` times the mean of the moment's diagonal is added to the diagonal, so that its root exists.
    """

    statistics = ("input_moment",)

    def __init__(self, *, damping: float = 0.01, **common: Any):
        super().__init__(**common)
        if not isinstance(damping, int | float) or isinstance(damping, bool) or damping <= 0:
            raise ConfigError(f"pruning.criterion.damping: {damping!r} must be a number above 0")
        self.damping = float(damping)

    def terms(self, name: str, weight: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return weight.square()
