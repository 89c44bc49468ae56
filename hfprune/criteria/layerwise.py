"""Criteria that visit a model layer by layer, each on what the pruned layers before it give: wanda."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from hfprune.criteria.criterion import Criterion, register_criterion
from hfprune.criteria.layers import Layer
from hfprune.errors import ConfigError
from hfprune.selection import LayerScores, pattern_candidates, select_each, select_rows


@dataclass(frozen=True)
class Goal:
    """How much of a layer is to be gone.

    Attributes:
        count: how many elements in all, those gone before included.
        kept, group: of an N:M pattern; 0 where there is none.
        whole: whether the pattern is to be complete; else the count is made up of a part of it.
    """

    count: int
    kept: int = 0
    group: int = 0
    whole: bool = True


class Layerwise(Criterion):
    """A criterion that looks at one layer at a time and prunes it before it looks at the next one.

    Each layer is pruned by what it sees when the layers before it are pruned already. Only weights of one layer are
    compared, so that with scope `global` every layer loses the same fraction as with scope `layer`.

    Attributes:
        updates: whether the weights that stay change too.
        products: whether it needs the sums of products of all pairs of inputs, or only of each input's squares.
        offload: hold hidden states that wait for the next block in the CPU's memory.
    """

    layerwise = True
    updates: ClassVar[bool] = False
    products: ClassVar[bool] = False

    def __init__(self, *, offload: bool = False, **common: Any):
        super().__init__(**common)
        if not isinstance(offload, bool):
            raise ConfigError(f"pruning.criterion.offload: {offload!r} must be true or false")
        self.offload = offload

    def prune_layer(
        self, layer: Layer, matrices: torch.Tensor, sums: torch.Tensor, gone: torch.Tensor | None, goal: Goal
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What of a layer goes, and the values of the rest.

        Args:
            layer: which one.
            matrices: its weight as (groups, rows, columns), in at least single precision.
            sums: the mean over all positions of each input's square, (groups, columns); or with `products` of the
                products of all pairs of inputs, (groups, columns, columns). It may be written over.
            gone: what is gone already, in the shape of `matrices`, or None.
            goal: how much is to be gone.

        Returns:
            A bool tensor, true for what is gone, and the new values of the rest, both in the shape of `matrices`.
        """
        raise NotImplementedError


@register_criterion("wanda")
class Wanda(Layerwise):
    """|w| times the Euclidean norm of the input that it meets, compared within each row of outputs (Sun 2023, arXiv
    2306.11695); the other weights stay as they are.

    Every row loses the same number of weights; the ones left over by rounding are spread evenly over the rows. An N:M
    pattern is chosen in every group by itself. Blocks and structural units sum the same product up over the whole model
    as it is. Convolutions: the norm is of what the place in the kernel meets in all patches.

    Args:
        per_row: compare within rows, which the paper finds best for large language models; otherwise all weights of a
            layer are compared, which small ones tend to lose less by.
        common: `batches` (8 by default) and `offload`.
    """

    statistics = ("input_norm",)
    pointwise = False
    by_row = True
    members = "layers"

    def __init__(self, *, per_row: bool = True, **common: Any):
        super().__init__(**common)
        if not isinstance(per_row, bool):
            raise ConfigError(f"pruning.criterion.per_row: {per_row!r} must be true or false")
        self.per_row = per_row

    def terms(self, name: str, weight: torch.Tensor, input_norm: torch.Tensor) -> torch.Tensor:
        return weight.abs() * input_norm

    def prune_layer(
        self, layer: Layer, matrices: torch.Tensor, sums: torch.Tensor, gone: torch.Tensor | None, goal: Goal
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = matrices.abs().mul_(sums.sqrt().unsqueeze(1))
        if goal.group:
            chosen = select_pattern(layer, scores, gone, goal)
        else:
            width = scores.shape[-1] if self.per_row else scores.numel()
            before = None if gone is None else gone.reshape(-1, width)
            chosen = select_rows(scores.reshape(-1, width), goal.count, before).view(scores.shape)
        return chosen, matrices


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is infinite or not a number, found without a copy of the values."""
    return not values.numel() or all(bool(torch.isfinite(end)) for end in values.aminmax())


def select_pattern(layer: Layer, scores: torch.Tensor, gone: torch.Tensor | None, goal: Goal) -> torch.Tensor:
    """What an N:M pattern removes of a layer, or the lowest part of that; shapes as in `prune_layer`."""
    weight = layer.weight
    along = weight.input_last(layer.from_matrices(scores))
    before = None if gone is None else weight.input_last(layer.from_matrices(gone))
    chosen = pattern_candidates(along, goal.kept, goal.group, before)
    if not goal.whole:
        flat = along.reshape(-1)
        known = None if before is None else before.reshape(-1)
        part = LayerScores(
            layer.name, flat.numel(), lambda start, stop: flat[start:stop], gone=known, candidates=chosen.reshape(-1)
        )
        chosen = select_each([part], {layer.name: goal.count})[layer.name].view(along.shape)
    return layer.to_matrices(chosen.movedim(-1, weight.input_dim))


def shares(total: int, sizes: list[int], least: list[int], most: list[int]) -> list[int]:
    """A total divided in proportion to sizes, each share within its bounds; the sum is exact where the bounds allow it.

    Shares are rounded down, and what is left over goes where most was cut off, the first of equals first.
    """

    def filled(fraction: float) -> list[int]:
        return [min(max(int(fraction * s), lo), hi) for s, lo, hi in zip(sizes, least, most, strict=True)]

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(filled(middle)) <= total else (low, middle)
    found = filled(low)
    rest = total - sum(found)
    order = sorted(range(len(sizes)), key=lambda i: found[i] - high * sizes[i])
    while rest > 0:
        open_ones = [i for i in order if found[i] < most[i]][:rest]
        if not open_ones:
            break
        for i in open_ones:
            found[i] += 1
        rest -= len(open_ones)
    return found
