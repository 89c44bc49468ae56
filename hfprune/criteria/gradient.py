"""Criteria of weight times gradient: taylor, snip, movement, synflow."""

from __future__ import annotations

from typing import Any

import torch

from hfprune.criteria.criterion import Criterion, register_criterion


@register_criterion("taylor")
class Taylor(Criterion):
    """(Sum of w·g)², or with `absolute` the sum of |w·g|; g averaged over batches (Molchanov 2019, 1906.10771)."""

    statistics = ("gradient",)
    scores_components = True

    def __init__(self, *, absolute: bool = False, **common: Any):
        super().__init__(**common)
        self.absolute = absolute

    def terms(self, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        products = weight * gradient
        return products.abs() if self.absolute else products

    def finish(self, total: torch.Tensor) -> torch.Tensor:
        return total if self.absolute else total.square()


@register_criterion("snip")
class Snip(Criterion):
    """Sum of |w·g| on the weights as they are; meant for the initialisation (Lee 2019, arXiv 1810.02340)."""

    statistics = ("gradient",)
    scores_components = True

    def terms(self, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        return (weight * gradient).abs()


@register_criterion("movement")
class Movement(Criterion):
    """Minus the sum of w·g over the training steps: weights that move towards zero go (Sanh 2020, arXiv 2005.07683).

    `PruningTrainer` adds it up while it trains. Before any training, and in `hfprune.prune`, the sum runs over
    calibration batches with the weights held still.
    """

    statistics = ("movement",)

    def terms(self, name: str, weight: torch.Tensor, movement: torch.Tensor) -> torch.Tensor:
        return -movement


@register_criterion("synflow")
class SynFlow(Criterion):
    """Σ |w · ∂R/∂w|, R the sum of the outputs of the network with |w| on an input of ones (Tanaka 2020, 2006.05467).

    It needs no data. Apply it in many steps, each of which scores anew: `schedule: {kind: geometric, steps: 100}`.
    """

    statistics = ("synaptic_flow",)

    def terms(self, name: str, weight: torch.Tensor, synaptic_flow: torch.Tensor) -> torch.Tensor:
        return (weight * synaptic_flow).abs()
