"""Coupled groups: the units that can be removed from a model, what each is made of, and what can't be cut and why."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from hfprune.errors import ModelError
from hfprune.structure import rules  # noqa: F401  (enters the rules)
from hfprune.structure.costs import Costs
from hfprune.structure.coupling import Member, Walk
from hfprune.structure.graph import Graph, export, uncollected
from hfprune.weights import is_transposed_linear

KINDS = ("head", "head_dim", "neuron", "width", "channel")


@dataclass(frozen=True)
class GroupMember:
    """One dimension of one tensor in a group.

    Attributes:
        tensor: its name in the model; of tied ones the first.
        dim: the dimension.
        indices: what each unit takes of it, shape (units, indices per unit).
    """

    tensor: str
    dim: int
    indices: torch.Tensor


@dataclass(frozen=True)
class CoupledGroup:
    """Units that are made alike; a unit is removed from all members at once.

    Attributes:
        name: that of its first weight.
        kind: `head`, `head_dim` (one dimension of all heads of a layer), `neuron` (inside a feed-forward block),
            `width` (a residual stream), or `channel` (any other).
        members: the tensor dimensions that go together.
        identities: the identity that stands for each unit, shape (units,).
    """

    name: str
    kind: str
    members: tuple[GroupMember, ...]
    identities: np.ndarray = field(repr=False)

    @property
    def units(self) -> int:
        """How many units there are."""
        return len(self.identities)

    @property
    def channels_per_unit(self) -> int:
        """How many channels a unit takes of its first weight."""
        return self.members[0].indices.shape[1]


@dataclass
class Structure:
    """What can be removed from a model.

    Attributes:
        model: the model that was analysed.
        graph, walk: what it was found from.
        groups: name to group, in the model's order.
        protected: reason to the tensor dimensions that can't be cut because of it.
        costs: parameters and multiplications, for any selection.
        links: names of groups that the model's code lets be cut only by the same fraction.
        already: which identities earlier removals took, as booleans; graph and walk still know them.
    """

    model: nn.Module
    graph: Graph
    walk: Walk
    groups: dict[str, CoupledGroup]
    protected: dict[str, list[str]]
    costs: Costs
    labels: np.ndarray = field(repr=False)
    links: tuple[tuple[str, ...], ...] = ()
    already: np.ndarray = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.already is None:
            self.already = np.zeros(len(self.labels), bool)

    def gone(self, removed: dict[str, torch.Tensor]) -> np.ndarray:
        """Which identities are gone, as booleans, when these units (indices by group) are removed too."""
        gone = self.already.copy()
        for name, units in removed.items():
            gone[self.groups[name].identities[units.numpy()]] = True
        return gone[self.labels]

    def without(self, removed: dict[str, torch.Tensor]) -> Structure:
        """The structure of the model once these units are removed from it, with no new look at the model.

        Groups, indices and costs are those of the smaller model. Graph and walk stay, so that what is removed later is
        proved against the graph from before the first removal.
        """
        gone = self.gone(removed)
        place = {}
        for member in self.walk.members:
            own = slice(member.first, member.first + member.size)
            if gone[own].any():
                # Indices are of the tensors as they are now: positions among what is not gone already.
                stays = ~gone[own][~self.already[own]]
                place[member.name, member.dim] = torch.from_numpy(np.cumsum(stays) - 1)
        groups = {}
        for name, group in self.groups.items():
            rows = np.flatnonzero(~gone[group.identities])
            if len(rows):
                members = tuple(_renumbered(m, torch.from_numpy(rows), place) for m in group.members)
                groups[name] = replace(group, members=members, identities=group.identities[rows])
        return replace(self, groups=groups, costs=self.costs.without(gone), already=gone)


def _renumbered(member: GroupMember, units: torch.Tensor, place: dict[tuple[str, int], torch.Tensor]) -> GroupMember:
    """A member of which these units stay, at the indices that they have then."""
    indices = member.indices[units]
    now = place.get((member.tensor, member.dim))
    return replace(member, indices=indices if now is None else now[indices])


@uncollected()
def analyse(model: nn.Module, example_inputs: Any = None, *, even_heads: bool = False) -> Structure:
    """Finds the coupled groups of a model, from its graph alone.

    Args:
        model: any module; it is not changed. On the meta device no values are needed.
        example_inputs: a tensor, a tuple or a dict of keyword arguments; may be left out for transformers and timm.
        even_heads: attention is cut inside its heads, alike in all of them, instead of head by head.

    Raises:
        ModelError: torch.export refuses the model, or the inputs don't fit it.
    """
    graph = export(model, example_inputs)
    convolutions = {n for n, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)}
    walk = Walk(graph, {f"{name}.weight" for name in convolutions}, even_heads).run()
    labels = walk.partition.labels()
    left_out = _left_out_of_files(model)
    fixed: dict[str, set[str]] = defaultdict(set)
    found: list[CoupledGroup] = []
    for units, parts in _alike(walk.members, labels, walk.protected):
        reason = walk.protected.get(int(units[0]))
        unsaved = sorted({member.name for member, _ in parts} & left_out)
        if reason is None and unsaved:
            reason = f"'{unsaved[0]}' is computed anew when the model is loaded"
        if reason is not None:  # units that are alike are protected one by one
            for unit in units.tolist():
                fixed[walk.protected.get(unit, reason)] |= {f"{member.name}[{member.dim}]" for member, _ in parts}
        elif len({member.name for member, _ in parts}) > 1:
            found.append(_group(model, walk, units, parts))
    groups: dict[str, CoupledGroup] = {}
    order = {(member.name, member.dim): number for number, member in enumerate(walk.members)}
    # By the first index of the first member, which a cut does not change: so names stay, cut after cut.
    for group in sorted(
        found, key=lambda g: (order[g.members[0].tensor, g.members[0].dim], int(g.members[0].indices.min()))
    ):
        name, copy = group.name, 2
        while name in groups:
            name, copy = f"{group.name}#{copy}", copy + 1
        groups[name] = replace(group, name=name)
    reasons = {reason: sorted(places) for reason, places in fixed.items()}
    return Structure(model, graph, walk, groups, reasons, Costs(walk, labels, _parameter_names(model)), labels)


def _alike(
    members: list[Member], labels: np.ndarray, protected: Iterable[int]
) -> Iterator[tuple[np.ndarray, list[tuple[Member, np.ndarray]]]]:
    """Units that take as many places of the same tensor dimensions, protected ones apart.

    Yields:
        The units' representatives, and for each member its indices by unit, shape (units, indices per unit).
    """
    if not members:
        return
    own = np.concatenate([labels[m.first : m.first + m.size] for m in members])
    which = np.concatenate([np.full(m.size, number) for number, m in enumerate(members)])
    index = np.concatenate([np.arange(m.size) for m in members])
    order = np.lexsort((index, which, own))
    own, which, index = own[order], which[order], index[order]
    # A signature a unit: the sum over its places of a number drawn for the member.
    drawn = np.random.default_rng(0).integers(1, 1 << 62, len(members), dtype=np.uint64)
    units, start = np.unique(own, return_index=True)
    signature = np.add.reduceat(drawn[which], start) + np.isin(units, list(protected)).astype(np.uint64)
    _, first, group_of = np.unique(signature, return_index=True, return_inverse=True)
    ends = np.append(start[1:], len(own))
    for number in np.argsort(first):
        chosen = np.flatnonzero(group_of == number)
        places = which[start[chosen[0]] : ends[chosen[0]]]
        rows = start[chosen][:, None] + np.arange(len(places))
        parts = [(members[m], index[rows[:, places == m]]) for m in np.unique(places)]
        yield units[chosen], parts


def _group(model: nn.Module, walk: Walk, units: np.ndarray, parts: list[tuple[Member, np.ndarray]]) -> CoupledGroup:
    members = [GroupMember(member.name, member.dim, torch.from_numpy(indices)) for member, indices in parts]
    shapes = {name: tensor.ndim for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    members.sort(key=lambda member: shapes[member.tensor] < 2)  # weights first, in the model's order
    names = [member.tensor for member in members]
    kind = "channel"
    if _any_in(walk, walk.heads, units):
        kind = "head_dim" if walk.even_heads else "head"
    elif _any_in(walk, walk.residual, units):
        kind = "width"
    elif all(_is_matrix(model, name) for name in names if shapes[name] > 1) and not _has_statistics(names):
        kind = "neuron"
    first = next((m for m in members if shapes[m.tensor] > 1 and _makes(model, m)), None)
    name = (first or members[0]).tensor.removesuffix(".weight").removesuffix("_weight")
    if first is None:
        name = f"{name}[{members[0].dim}]"
    else:
        members.insert(0, members.pop(next(i for i, m in enumerate(members) if m is first)))
    return CoupledGroup(name, kind, tuple(members), units)


def _makes(model: nn.Module, member: GroupMember) -> bool:
    """Whether a weight makes the units, with its output dimension, rather than takes them."""
    module = model.get_submodule(member.tensor.rpartition(".")[0])
    turned = is_transposed_linear(module) or isinstance(module, nn.modules.conv._ConvTransposeNd | nn.Embedding)
    return member.dim == (1 if turned else 0)


def _any_in(walk: Walk, marked: list[torch.Tensor], units: np.ndarray) -> bool:
    if not marked:
        return False
    return bool(torch.isin(walk.partition.find(torch.cat(marked)), torch.from_numpy(units)).any())


def _is_matrix(model: nn.Module, name: str) -> bool:
    """Whether a weight maps vectors: a linear layer's, experts' stacked ones, or a convolution's at one position."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    return not isinstance(module, nn.modules.conv._ConvNd) or all(n == 1 for n in getattr(module, leaf).shape[2:])


def _has_statistics(names: list[str]) -> bool:
    return any(name.endswith(("running_mean", "running_var")) for name in names)


def _left_out_of_files(model: nn.Module) -> set[str]:
    """Parameters that transformers does not save, such as sinusoidal positions."""
    patterns = getattr(model, "_keys_to_ignore_on_save", None) or ()
    return {name for name, _ in model.named_parameters() if any(re.search(pattern, name) for pattern in patterns)}


def _parameter_names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def check_example(structure: Structure) -> None:
    """Raises where nothing at all can be removed.

    Raises:
        ModelError: no group was found; the first reasons.
    """
    if not structure.groups:
        reasons = "; ".join(list(structure.protected)[:3])
        raise ModelError(f"nothing of {type(structure.model).__name__} can be removed: {reasons}")
