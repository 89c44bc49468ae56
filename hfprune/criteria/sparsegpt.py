"""sparsegpt: what goes is chosen by what it costs the layer's output, and the weights that stay make up for it."""

from __future__ import annotations

from typing import Any

import torch

from hfprune.criteria.criterion import register_criterion
from hfprune.criteria.layers import Layer
from hfprune.criteria.layerwise import Goal, Layerwise, all_finite, select_pattern
from hfprune.errors import ConfigError, ModelError
from hfprune.selection import LayerScores, select

TRIES = 10
DEAD = 1e-6
"""What is left of the damping for inputs that are always zero, so that their weights go before all others."""


@register_criterion("sparsegpt")
class SparseGPT(Layerwise):
    """Optimal Brain Surgeon a row at a time with the inverse Hessian that all rows share (Frantar 2023, arXiv
    2301.00774).

    Columns are visited from left to right. In every block of `block_size` of them the weights of least w² / U_jj² go,
    U the upper Cholesky factor of the inverse of X^T X plus `damping` times its mean diagonal; the columns to the right
    take up the error. Of an N:M pattern every group is chosen when its first column is reached. The counts of the
    blocks add up to the layer's.

    Args:
        block_size: columns that are chosen from together.
        damping: fraction of the mean diagonal that is added to the diagonal; ten times more where that is not enough.
        common: `batches` (8 by default) and `offload`.
    """

    updates = True
    products = True

    def __init__(self, *, block_size: int = 128, damping: float = 0.01, **common: Any):
        super().__init__(**common)
        if not isinstance(block_size, int) or isinstance(block_size, bool) or block_size < 1:
            raise ConfigError(f"pruning.criterion.block_size: {block_size!r} must be a whole number, at least 1")
        if not isinstance(damping, int | float) or isinstance(damping, bool) or not 0 < damping < float("inf"):
            raise ConfigError(f"pruning.criterion.damping: {damping!r} must be a number above 0")
        self.block_size, self.damping = block_size, damping

    def prune_layer(
        self, layer: Layer, matrices: torch.Tensor, sums: torch.Tensor, gone: torch.Tensor | None, goal: Goal
    ) -> tuple[torch.Tensor, torch.Tensor]:
        factor = inverse_factor(sums, self.damping, layer.name)
        values = matrices.clone()
        gone = torch.zeros_like(values, dtype=torch.bool) if gone is None else gone.clone()
        if goal.group and goal.whole and layer.groups > 1 and layer.width % goal.group:
            # Groups of the pattern lie across groups of the layer, which no left to right order does justice to.
            scores = values.square() / factor.diagonal(dim1=1, dim2=2).square().unsqueeze(1)
            gone, goal = select_pattern(layer, scores, gone, goal), Goal(0)
            goal = Goal(int(gone.sum()))
        starts = _group_starts(values.shape[2], layer.width, goal.group)
        for first, last in _spans(values.shape[2], self.block_size, starts, goal.group):
            if not goal.whole or not goal.group:
                gone[:, :, first:last] = self._chosen(values, gone, factor, (first, last), starts, goal)
            inside = [start - first for start in starts if first <= start < last] if goal.group and goal.whole else []
            errors = _sweep(values, gone, factor, (first, last), inside, goal)
            values[:, :, last:] -= errors @ factor[:, first:last, last:]
        return gone, values

    def _chosen(
        self,
        values: torch.Tensor,
        gone: torch.Tensor,
        factor: torch.Tensor,
        span: tuple[int, int],
        starts: list[int],
        goal: Goal,
    ) -> torch.Tensor:
        """What of a span of columns is gone, so many that the layer's count comes out exactly at its last column."""
        first, last = span
        part, before = values[:, :, first:last], gone[:, :, first:last]
        scores = part.square() / factor.diagonal(dim1=1, dim2=2)[:, None, first:last].square()
        able = torch.ones_like(before)
        rest_gone, rest_able = int(gone[:, :, last:].sum()), gone[:, :, last:].numel()
        if goal.group:
            inside = [start - first for start in starts if first <= start < last]
            able = _lowest_of_groups(scores, before, inside, goal) | before
            away = goal.group - goal.kept
            rest_able = sum(start >= last for start in starts) * away * gone.shape[0] * gone.shape[1]
        done = int(gone[:, :, :first].sum())
        share = last / values.shape[2] if not goal.group else sum(s < last for s in starts) / max(1, len(starts))
        wanted = round(goal.count * share) - done
        wanted = max(wanted, goal.count - done - rest_able, int(before.sum()))
        wanted = min(wanted, goal.count - done - rest_gone, int(able.sum()))
        flat = scores.reshape(-1)
        layer = LayerScores(
            "", flat.numel(), lambda a, b: flat[a:b], gone=before.reshape(-1), candidates=able.reshape(-1)
        )
        return select([layer], max(wanted, layer.already))[""].view(before.shape)


def inverse_factor(sums: torch.Tensor, damping: float, name: str) -> torch.Tensor:
    """The upper Cholesky factor U of the inverse of the damped Hessian, with U^T U the inverse.

    Inputs that are always zero get next to no curvature, so that their weights go first and nothing flows into them; a
    layer that saw nothing at all counts as one whose inputs are independent and of equal size.

    Args:
        sums: (groups, columns, columns), positive semi-definite; it is used up, since a copy of that size would be the
            largest thing in memory.
        damping: fraction of the mean diagonal.
        name: the weight's name, for the message.

    Raises:
        ModelError: no damping makes the matrix definite.
    """
    diagonal = sums.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1)[:, None, None]
    # What the Hessian is divided by cancels out of both scores and updates; numbers around 1 are inverted best.
    sums.div_(torch.where(mean > 0, mean, 1.0))
    diagonal.add_((mean <= 0).squeeze(2).to(sums.dtype))
    undamped = diagonal.clone()
    added = torch.where(undamped > 0, damping, DEAD * damping)
    for attempt in range(TRIES):  # from the damping asked for up to that which leaves the diagonal alone
        diagonal.copy_(undamped + added * 10.0**attempt)
        factor, failed = torch.linalg.cholesky_ex(sums)
        if failed.any():
            continue
        if sums.device.type == "cpu":  # in place, which LAPACK allows: one copy beside the sums, not two
            torch.cholesky_inverse(factor, out=factor)
            torch.linalg.cholesky_ex(factor, upper=True, out=(factor, failed))
        else:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
        if not failed.any() and all_finite(factor):
            return factor
    raise ModelError(f"pruning.criterion: 'sparsegpt' can't invert the Hessian of '{name}'; give more damping")


def _sweep(
    values: torch.Tensor,
    gone: torch.Tensor,
    factor: torch.Tensor,
    span: tuple[int, int],
    starts: list[int],
    goal: Goal,
) -> torch.Tensor:
    """Zeroes what goes in a span of columns, from left to right, and lets the rest of the span make up for it.

    Returns:
        What the columns to the right still have to make up for, (groups, rows, columns of the span).
    """
    first, last = span
    part, mask = values[:, :, first:last].clone(), gone[:, :, first:last]
    upper = factor[:, first:last, first:last]
    diagonal = upper.diagonal(dim1=1, dim2=2)
    errors = torch.zeros_like(part)
    begins = set(starts)
    for column in range(last - first):
        if column in begins:
            stop = column + goal.group
            scores = part[:, :, column:stop].square() / diagonal[:, None, column:stop].square()
            mask[:, :, column:stop] |= _lowest_of_groups(scores, mask[:, :, column:stop], [0], goal)
        error = torch.where(mask[:, :, column], part[:, :, column], 0.0) / diagonal[:, None, column]
        errors[:, :, column] = error
        part[:, :, column:] -= error.unsqueeze(2) * upper[:, None, column, column:]
    values[:, :, first:last] = part.masked_fill(mask, 0.0)
    return errors


def _lowest_of_groups(scores: torch.Tensor, gone: torch.Tensor, starts: list[int], goal: Goal) -> torch.Tensor:
    """What N:M removes in the groups that begin at some columns; what is gone already comes first."""
    chosen = torch.zeros_like(gone)
    if not starts:
        return chosen
    places = torch.tensor(starts, device=scores.device)[:, None] + torch.arange(goal.group, device=scores.device)
    ranked = scores.masked_fill(gone, -torch.inf)[:, :, places]
    order = ranked.argsort(dim=-1, stable=True)[..., : goal.group - goal.kept]
    lowest = torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, order, True)
    chosen[:, :, places.flatten()] = lowest.flatten(2)
    return chosen


def _group_starts(columns: int, width: int, group: int) -> list[int]:
    """The first column of every N:M group; a group never reaches from one kernel position into the next."""
    if not group:
        return []
    return [base + start for base in range(0, columns, width) for start in range(0, width - group + 1, group)]


def _spans(columns: int, size: int, starts: list[int], group: int) -> list[tuple[int, int]]:
    """Ranges of about `size` columns that cut no N:M group."""
    spans, first = [], 0
    inside = {start + step: start for start in starts for step in range(1, group)}
    while first < columns:
        last = min(first + size, columns)
        if last in inside:
            last = inside[last] if inside[last] > first else inside[last] + group
        spans.append((first, last))
        first = last
    return spans
