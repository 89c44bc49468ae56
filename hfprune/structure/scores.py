"""Scores of coupled groups: a criterion's terms, summed over a unit's part of every member, then reduced over them."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from hfprune.criteria.criterion import Criterion
from hfprune.errors import ConfigError, ModelError
from hfprune.structure.groups import CoupledGroup, GroupMember
from hfprune.weights import Weight, layer_weights, norm_scales, scorable

_MISSING = {
    "layers": "has no weight of a linear layer or convolution",
    "inputs": "is the input of no linear layer or convolution",
    "norms": "has no norm with a scale",
}
"""Why a group has no member that a criterion could score it by."""


@dataclass(frozen=True)
class ScoredMember:
    """A member that counts for its group's score.

    Attributes:
        group: the group's name.
        tensor: the parameter's name.
        dim: the dimension along which the units lie.
        indices: what each unit takes of it, shape (units, indices per unit).
    """

    group: str
    tensor: str
    dim: int
    indices: torch.Tensor


def scored_weights(model: nn.Module, groups: Iterable[CoupledGroup], criterion: Criterion) -> dict[str, Weight]:
    """The parameters that a criterion scores groups by."""
    members = scored_members(model, groups, criterion)
    parameters = dict(model.named_parameters()) if members else {}
    return {m.tensor: Weight(m.tensor, parameters[m.tensor], parameters[m.tensor].ndim - 1) for m in members}


def scored_members(model: nn.Module, groups: Iterable[CoupledGroup], criterion: Criterion) -> list[ScoredMember]:
    """The members that count for the groups' scores: by default their weights, and biases and norms only where there is
    nothing else (`Criterion.members`).

    Raises:
        ConfigError: a group has no such member.
    """
    if criterion.members == "none":
        return []
    dimensions = {name: parameter.ndim for name, parameter in model.named_parameters()}
    layers = layer_weights(model) if criterion.members in ("layers", "inputs") else {}
    norms = norm_scales(model) if criterion.members == "norms" else set()
    fits: dict[str, Callable[[GroupMember], bool]] = {
        "weights": lambda m: dimensions[m.tensor] > 1,
        "layers": lambda m: m.tensor in layers,
        "inputs": lambda m: m.tensor in layers and layers[m.tensor][1] == m.dim,
        "norms": lambda m: m.tensor in norms,
    }
    found = []
    for group in groups:
        own = [member for member in group.members if member.tensor in dimensions]
        chosen = [member for member in own if fits[criterion.members](member)]
        if not chosen and criterion.members != "weights":
            raise ConfigError(
                f"pruning.criterion: '{criterion.name}' can't score '{group.name}', which "
                f"{_MISSING[criterion.members]}; name it in `ignore`, or use another criterion"
            )
        found += [ScoredMember(group.name, m.tensor, m.dim, m.indices) for m in chosen or own]
    return found


def score_groups(
    model: nn.Module,
    groups: Iterable[CoupledGroup],
    criterion: Criterion,
    statistics: dict[str, tuple[torch.Tensor, ...]],
    reduction: str = "mean",
    normalize: str = "mean",
    values: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """The score of every unit, by group name; the lowest go first.

    A unit's score in one member is the criterion's own formula over the unit's part of it. Over the members it is
    reduced (`mean`, `sum` or `max`), and within the group divided by the mean or the largest score, so that groups of
    different sizes can be ranked together; `none` leaves it. Where the model has none, `values` has those of its
    parameters; each is looked up once.

    Raises:
        ModelError: a score that is not a number.
    """
    groups = list(groups)
    if criterion.members == "none":  # made alike for all groups: they compare as they are
        return {group.name: criterion.units(group.name, torch.empty(group.units, 0)) for group in groups}
    wanted: dict[str, list[ScoredMember]] = defaultdict(list)
    for member in scored_members(model, groups, criterion):
        if member.tensor in statistics:  # others took no part in any calibration batch
            wanted[member.tensor].append(member)
    values = dict(model.named_parameters()) if values is None else values
    # Made beforehand: what is kept between large temporaries would split their memory.
    counts = Counter(member.group for members in wanted.values() for member in members)
    units = {group.name: group.units for group in groups}
    parts = {name: torch.empty(count, units[name], dtype=torch.float64) for name, count in counts.items()}
    rows = {name: iter(part) for name, part in parts.items()}
    for name, members in wanted.items():  # the terms of one tensor at a time are held
        value = scorable(values[name].detach())
        for member, score in _unit_scores(criterion, name, value, statistics[name], members):
            next(rows[member.group]).copy_(score)
    scores = {}
    for group in groups:
        if group.name not in parts:
            raise ModelError(
                f"pruning.criterion: '{criterion.name}' can't score '{group.name}': none of its layers took part in "
                f"any calibration batch; name it in `ignore`, or give batches that reach it"
            )
        reduced = _reduced(parts[group.name], reduction)
        mean = float(torch.linalg.vector_norm(reduced, 1)) / len(reduced)
        if not math.isfinite(mean) and not torch.isfinite(reduced).all():
            raise ModelError(f"pruning.criterion: '{criterion.name}' gave scores that are not finite in '{group.name}'")
        size = {"mean": mean, "none": 1.0}.get(normalize) or float(reduced.abs().max())
        scores[group.name] = reduced / size if size > 0 else reduced
    return scores


def _reduced(parts: torch.Tensor, reduction: str) -> torch.Tensor:
    """One score a unit, shape (units,), from those in the members of its group, shape (members, units)."""
    if len(parts) == 1:
        return parts[0]
    if reduction == "max":
        return parts.amax(0)
    return parts.mean(0) if reduction == "mean" else parts.sum(0)


def _unit_scores(
    criterion: Criterion,
    name: str,
    value: torch.Tensor,
    statistics: tuple[torch.Tensor, ...],
    members: list[ScoredMember],
) -> Iterator[tuple[ScoredMember, torch.Tensor]]:
    """The scores of the units of every group that one tensor is a member of."""
    if criterion.of_units:
        for member in members:
            parts = [_by_unit(tensor, member) for tensor in (value, *statistics)]
            yield member, criterion.units(name, *parts)
        return
    terms = criterion.terms(name, value, *statistics)
    for member in members:
        along = terms.sum([d for d in range(terms.ndim) if d != member.dim]) if terms.ndim > 1 else terms
        yield member, criterion.finish(along[member.indices.to(along.device)].sum(1))


def _by_unit(tensor: torch.Tensor, member: ScoredMember) -> torch.Tensor:
    """A tensor, or what broadcasts to it, as a matrix: units x elements."""
    return tensor.movedim(member.dim, 0)[member.indices.to(tensor.device)].flatten(1)
