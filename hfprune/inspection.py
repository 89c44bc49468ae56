"""inspect(): which units a model is made of, what each group of them costs, and what can't be removed and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Group as Stack
from rich.table import Table
from torch import nn

from hfprune.errors import ConfigError
from hfprune.granularity import REMOVABLE
from hfprune.profiling import human_count
from hfprune.registry import did_you_mean
from hfprune.structure.blocks import find_blocks
from hfprune.structure.groups import CoupledGroup, Structure, analyse
from hfprune.structure.trial import without_impossible

_MOST_REASONS, _MOST_PLACES = 12, 3


@dataclass(frozen=True)
class GroupFacts:
    """A coupled group, or a residual block, as people look at it.

    Attributes:
        name: that of its first weight, or the block's path.
        kind: `head`, `neuron`, `width`, `channel`, or `layer` for a block.
        units: how many can go one by one.
        channels: channels that a unit takes of the first weight.
        members: the tensor dimensions that are cut together, such as `fc1.weight[0]`.
        params, macs: what the whole group carries: parameters, and multiply-accumulates of one example.
    """

    name: str
    kind: str
    units: int
    channels: int
    members: tuple[str, ...]
    params: int
    macs: int


@dataclass(frozen=True)
class Inspection:
    """What can be removed from a model.

    Attributes:
        model: its class.
        params, macs: of the whole model.
        groups: the coupled groups in the model's order, then the residual blocks.
        linked: names of groups that can only be cut by one and the same fraction.
        protected: reason to the tensor dimensions that can't be cut because of it.
    """

    model: str
    params: int
    macs: int
    groups: tuple[GroupFacts, ...]
    linked: tuple[tuple[str, ...], ...] = ()
    protected: dict[str, list[str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def table(self) -> Stack:
        """For `rich.print`: one row a group, then what is protected, grouped by its reason."""
        size = f"{self.params:,} parameters, {human_count(self.macs)} MACs"
        table = Table(title=f"{self.model}: {size}", title_justify="left")
        for column in ("group", "kind", "units", "channels a unit", "tensors", "parameters", "MACs"):
            table.add_column(column, justify="left" if column in ("group", "kind") else "right", overflow="fold")
        for group in self.groups:
            counts = (f"{group.units:,}", f"{group.channels:,}" if group.channels else "", f"{len(group.members):,}")
            table.add_row(group.name, group.kind, *counts, f"{group.params:,}", human_count(group.macs))
        units = sum(group.units for group in self.groups)
        table.add_section()
        table.add_row(f"{len(self.groups)} groups", "", f"{units:,}", "", "", "", "")
        parts: list[Any] = [
            table,
            "A group's parameters and MACs are what all its units carry together; groups overlap.",
        ]
        parts += [f"cut alike, by one fraction: {_listed(link)}" for link in self.linked[:_MOST_REASONS]]
        return Stack(*parts, *([self._protected()] if self.protected else []))

    def _protected(self) -> Table:
        table = Table(title="protected", title_justify="left")
        for column in ("why", "tensors", "which", "the first, where"):
            table.add_column(column, justify="right" if column == "tensors" else "left", overflow="fold")
        alike: dict[str, list[str]] = {}  # what differs only in the place is one line
        for reason in self.protected:
            alike.setdefault(reason.partition(" (")[0], []).append(reason)
        for why, reasons in list(alike.items())[:_MOST_REASONS]:
            places = [place for reason in reasons for place in self.protected[reason]]
            where = reasons[0].removeprefix(why).strip().removeprefix("(").removesuffix(")")
            table.add_row(why, f"{len(places):,}", _listed(places), where)
        if rest := list(alike.values())[_MOST_REASONS:]:
            count = sum(len(self.protected[reason]) for reasons in rest for reason in reasons)
            table.add_row(f"{len(rest)} more reasons", f"{count:,}", "", "")
        return table


def inspect(model: nn.Module, example_inputs: Any = None, granularity: str | Sequence[str] | None = None) -> Inspection:
    """Finds what can be removed from a model and what that would save; the model is left as it was.

    Every group is tried: what the model's code does not let go is protected, with the reason.

    Example:
        >>> found = hfprune.inspect(model, torch.randn(1, 3, 224, 224))
        >>> rich.print(found.table())

    Args:
        model: any module.
        example_inputs: a tensor, a tuple or a dict of keyword arguments; may be left out for transformers and timm.
        granularity: only groups of these kinds; `channel` stands for all of them, `layer` for residual blocks.

    Raises:
        ConfigError: a granularity that is not structural.
        ModelError: torch.export refuses the model (the reason and the line), or the inputs don't fit it.
    """
    kinds = set(REMOVABLE if granularity is None else [granularity] if isinstance(granularity, str) else granularity)
    for kind in sorted(kinds - set(REMOVABLE)):
        raise ConfigError(f"granularity: '{kind}' is nothing that can be removed; {did_you_mean(kind, REMOVABLE)}")
    structure = without_impossible(analyse(model, example_inputs))
    groups = [
        _facts(structure, group) for group in structure.groups.values() if "channel" in kinds or group.kind in kinds
    ]
    if "layer" in kinds:
        for block in find_blocks(structure):
            names = [f"{block.path}.{name}" for name, _ in model.get_submodule(block.path).named_parameters()]
            params = sum(parameter.numel() for parameter in model.get_submodule(block.path).parameters())
            macs = round(structure.costs.macs_of(block.path))
            groups.append(GroupFacts(block.path, "layer", 1, 0, tuple(names), params, macs))
    shown = {group.name for group in groups}
    costs = structure.costs
    return Inspection(
        type(model).__name__,
        round(costs.params()),
        round(costs.macs()),
        tuple(groups),
        tuple(tuple(link) for link in structure.links if shown & set(link)),
        {reason: list(places) for reason, places in structure.protected.items()},
    )


def _facts(structure: Structure, group: CoupledGroup) -> GroupFacts:
    gone = structure.gone({group.name: torch.arange(group.units)})
    costs = structure.costs
    members = tuple(f"{member.tensor}[{member.dim}]" for member in group.members)
    params, macs = costs.params() - costs.params(gone), costs.macs() - costs.macs(gone)
    return GroupFacts(group.name, group.kind, group.units, group.channels_per_unit, members, round(params), round(macs))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_PLACES:,} more" if len(names) > _MOST_PLACES else ""
    return ", ".join(names[:_MOST_PLACES]) + more
