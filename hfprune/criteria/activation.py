"""Criteria of activations: apoz, mean_activation, entropy, wanda."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from hfprune.criteria.criterion import Criterion, count, register_criterion


class OfInputs(Criterion):
    """A channel's activations, as the layers that take it see them: after the activation function.

    A unit's score is the mean over its channels, and then over the layers that take it.
    """

    of_units: ClassVar[bool] = True
    members: ClassVar[str] = "inputs"

    def units(self, name: str, weight: torch.Tensor, *statistics: torch.Tensor) -> torch.Tensor:
        return statistics[0].mean(1)


@register_criterion("apoz")
class Apoz(OfInputs):
    """1 - the average percentage of zeros: the share of positions at which the channel is active, that is above zero.

    After a ReLU this is the paper's (Hu 2016, arXiv 1607.03250); after GELU or SiLU, which are hardly ever exactly
    zero, what is not above zero counts as not active.
    """

    statistics = ("active_fraction",)


@register_criterion("mean_activation")
class MeanActivation(OfInputs):
    """The mean of |x| (Molchanov 2017, arXiv 1611.06440; ICE-Pruning, arXiv 2505.07411); after a ReLU that of x."""

    statistics = ("mean_activation",)


@register_criterion("entropy")
class Entropy(OfInputs):
    """The entropy of the channel's values in a histogram of `bins` between their least and their largest.

    After Luo & Wu 2017 (arXiv 1706.05791), who take one pooled value an image; here every position counts.
    """

    statistics = ("activation_entropy",)

    def __init__(self, *, bins: int = 32, **common: Any):
        super().__init__(**common)
        self.bins = count("bins", bins, least=2)


@register_criterion("wanda")
class Wanda(Criterion):
    """|w| · ||x_j||₂, compared within each output row for single weights (Sun 2023, arXiv 2306.11695).

    Convolutions: x_j is what the place in the kernel meets in all patches. Blocks and structural units sum it up.
    """

    statistics = ("input_norm",)
    pointwise = False
    by_row = True
    members = "layers"

    def terms(self, name: str, weight: torch.Tensor, input_norm: torch.Tensor) -> torch.Tensor:
        return weight.abs() * input_norm
