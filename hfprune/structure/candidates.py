"""Coupled groups as a choice sees them: scores that can be compared, what each unit saves, and how many may go."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from hfprune.structure.groups import CoupledGroup
from hfprune.structure.targets import Candidates
from hfprune.weights import pattern_for

if TYPE_CHECKING:
    from hfprune.structure.pruner import StructuredPruner


def candidates(pruner: StructuredPruner, scores: dict[str, torch.Tensor], measured: str) -> list[Candidates]:
    """The candidates of a pruner's groups; linked groups count as one.

    Against a cost, a score that is normalised within its group stands for an average unit of it, so it is weighed by
    the unit's number of parameters: one large unit is worth as much as the many small ones it equals.

    Args:
        pruner: whose groups, limits and ratios count.
        scores: of every unit, by group.
        measured: `ratio`, `params` or `macs`.
    """
    nothing = pruner.structure.gone({})
    costs = pruner.structure.costs
    saved = None if measured == "ratio" else costs.marginal(measured, nothing)
    sizes = None if measured == "ratio" else costs.marginal("params", nothing)
    single: dict[str, Candidates] = {}
    for index, (name, group) in enumerate(pruner.groups.items()):
        value, savings = scores[name], torch.ones(group.units)
        if saved is not None:
            savings = torch.from_numpy(saved[group.identities])
            value = value * torch.from_numpy(sizes[group.identities])
        peers = f"{group.kind} {[(m.indices.shape[1], m.dim) for m in group.members[:1]]} {group.units}"
        own = _own_ratio(pruner, index, group)
        single[name] = Candidates(name, value, savings, peers, group.channels_per_unit, _most(pruner, group.units), own)
    found: list[Candidates] = []
    linked = {name for link in pruner.structure.links for name in link}
    for link in pruner.structure.links:
        if all(name in single for name in link):
            found.append(_linked(pruner, [single[name] for name in link]))
    found += [candidate for name, candidate in single.items() if name not in linked]
    return [candidate for candidate in found if candidate.most > 0]


def _most(pruner: StructuredPruner, units: int) -> int:
    least = pruner.config.min_kept
    least = least if isinstance(least, int) else math.ceil(least * units)
    return max(0, units - max(1, least))


def _linked(pruner: StructuredPruner, members: list[Candidates]) -> Candidates:
    """Groups of one fraction as one: as many pieces as divide them all, the least important units in the first."""
    pieces = math.gcd(*(len(member.scores) for member in members))
    parts = {m.name: list(m.order.view(pieces, -1)) for m in members}
    scores = torch.stack([torch.stack([m.scores[part].sum() for part in parts[m.name]]) for m in members]).sum(0)
    savings = torch.stack([torch.stack([m.savings[part].sum() for part in parts[m.name]]) for m in members]).sum(0)
    channels = math.gcd(*(len(m.scores) // pieces * m.channels for m in members))
    ratio = next((m.ratio for m in members if m.ratio is not None), None)
    name = members[0].name
    return Candidates(name, scores, savings, f"linked {name}", channels, _most(pruner, pieces), ratio, parts)


def _own_ratio(pruner: StructuredPruner, index: int, group: CoupledGroup) -> float | None:
    """The ratio that `per_layer` gives this group, of the units that it still has."""
    per_layer = pruner.config.per_layer
    if isinstance(per_layer, list):
        return per_layer[index]
    names = [group.name, *(member.tensor for member in group.members)]
    found = next((p for name in names if (p := pattern_for(name, per_layer)) is not None), None)
    if found is None:
        return None
    dense = pruner.dense_units(group)
    return max(0.0, 1 - (1 - per_layer[found]) * dense / group.units)
