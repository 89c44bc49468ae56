"""Scores of coupled groups: a criterion's terms, summed over a unit's part of every member, then reduced over them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn

from hfprune.criteria.criterion import Criterion
from hfprune.errors import ModelError
from hfprune.structure.groups import CoupledGroup
from hfprune.weights import Weight


def scored_weights(model: nn.Module, groups: Iterable[CoupledGroup]) -> dict[str, Weight]:
    """The parameters that groups are scored by: their weights; biases and norms only where there is nothing else."""
    parameters = dict(model.named_parameters())
    found: dict[str, Weight] = {}
    for group in groups:
        for name, _, _ in scored_members(parameters, group):
            found[name] = Weight(name, parameters[name], input_dim=parameters[name].ndim - 1)
    return found


def scored_members(parameters: dict[str, nn.Parameter], group: CoupledGroup) -> list[tuple[str, int, torch.Tensor]]:
    """The members of a group that count for its score: tensor name, dimension, indices a unit."""
    own = [m for m in group.members if m.tensor in parameters]
    weights = [m for m in own if parameters[m.tensor].ndim > 1]
    return [(m.tensor, m.dim, m.indices) for m in weights or own]


def score_groups(
    model: nn.Module,
    groups: Iterable[CoupledGroup],
    criterion: Criterion,
    statistics: dict[str, tuple[torch.Tensor, ...]],
    reduction: str = "mean",
    normalize: str = "mean",
) -> dict[str, torch.Tensor]:
    """The score of every unit, by group name; the lowest go first.

    A unit's score in one member is the criterion's own formula over the unit's part of it. Over the members it is
    reduced (`mean`, `sum` or `max`), and within the group divided by the mean or the largest score, so that groups of
    different sizes can be ranked together; `none` leaves it.

    Raises:
        ModelError: a score that is not a number.
    """
    groups = list(groups)
    parameters = dict(model.named_parameters())
    wanted: dict[str, list[tuple[torch.Tensor, int, torch.Tensor]]] = defaultdict(list)
    parts: dict[str, torch.Tensor] = {}  # made beforehand: what is kept between large temporaries splits their memory
    for group in groups:
        members = scored_members(parameters, group)
        parts[group.name] = torch.empty(len(members), group.units, dtype=torch.float64)
        for row, (name, dim, indices) in zip(parts[group.name], members, strict=True):
            wanted[name].append((row, dim, indices))
    for name, uses in wanted.items():  # the terms of one tensor at a time are held
        value = parameters[name].detach()
        if value.dtype not in (torch.float32, torch.float64):
            value = value.float()
        terms = criterion.terms(name, value, *statistics[name])
        for row, dim, indices in uses:
            along = terms.sum([d for d in range(terms.ndim) if d != dim]) if terms.ndim > 1 else terms
            units = along[indices.to(along.device)].sum(1)
            row.copy_(criterion.finish(units))
    scores = {}
    for group in groups:
        stacked = parts[group.name]
        reduced = {"mean": stacked.mean(0), "sum": stacked.sum(0), "max": stacked.max(0).values}[reduction]
        if not torch.isfinite(reduced).all():
            raise ModelError(f"pruning.criterion: gave scores that are not finite in '{group.name}'")
        size = {"mean": reduced.abs().mean(), "max": reduced.abs().max(), "none": torch.tensor(1.0)}[normalize]
        scores[group.name] = reduced / size if float(size) > 0 else reduced
    return scores
