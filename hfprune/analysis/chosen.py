"""Sensitivity: what every layer can lose, as a table, plain values, a picture, and a recipe's `per_layer`."""

from __future__ import annotations

import glob
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Group as Stack
from rich.table import Table

from hfprune.report.tables import is_fraction, percent, title

FORMAT_VERSION = 1
UNKNOWN = "–"


@dataclass(frozen=True)
class LayerTolerance:
    """What one layer or group can lose.

    Attributes:
        units: how many it has.
        pruned: how many of them went at each ratio; whole units, and at least one stays of a group.
        values: the metric at each ratio; None where the model's code does not let the cut go.
        chosen: the ratio for a recipe: the largest one up to which no drop exceeds the tolerance; 0 if there is none.
        groups: the groups that were cut, by one fraction where they are several; empty for layers that are masked.
    """

    units: int
    pruned: tuple[int, ...]
    values: tuple[float | None, ...]
    chosen: float = 0.0
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sensitivity:
    """What `sensitivity` found. Single weights and blocks were set to zero, units of coupled groups removed, and all of
    it put back.

    Attributes:
        model: its class.
        criterion: what chose the units.
        granularity: what was pruned.
        metric: the metric's name; `greater_is_better` says which way it is good.
        dense: its value on the model as it is.
        ratios: those tried, ascending.
        tolerance: the drop that is tolerated, as a fraction of the dense value.
        layers: layer or group to what it can lose.
        limits: `include` and `ignore`, where they were given.
        note: why the granularity is not the usual one.
    """

    model: str
    criterion: str | dict[str, Any]
    granularity: tuple[str, ...]
    metric: str
    greater_is_better: bool
    dense: float
    ratios: tuple[float, ...]
    tolerance: float
    layers: dict[str, LayerTolerance]
    limits: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def per_layer(self) -> dict[str, float]:
        """Pattern to ratio, as `PruningConfig.per_layer` takes it."""
        return {
            glob.escape(part): entry.chosen for name, entry in self.layers.items() for part in entry.groups or (name,)
        }

    @property
    def ratio(self) -> float:
        """The fraction of all the units that goes with the chosen ratios."""
        units = sum(entry.units for entry in self.layers.values())
        chosen = [entry for entry in self.layers.values() if entry.chosen]
        return sum(entry.pruned[self.ratios.index(entry.chosen)] for entry in chosen) / units

    def pruning(self) -> dict[str, Any]:
        """The recipe's `pruning:` section that prunes every layer by its chosen ratio."""
        kinds = list(self.granularity)
        # Groups were cut by single units, so that rounding would give other widths than those measured.
        rounding = {"round_to": 1} if any(entry.groups for entry in self.layers.values()) else {}
        return {
            "criterion": self.criterion,
            "granularity": kinds[0] if len(kinds) == 1 else kinds,
            "target": {"ratio": round(self.ratio, 4)},
            **rounding,
            **self.limits,
            "per_layer": self.per_layer,
        }

    def to_yaml(self) -> str:
        """`pruning` as YAML, with the rule by which the ratios were chosen."""
        tried = ", ".join(f"{ratio:g}" for ratio in self.ratios)
        rule = (
            f"# The largest of the ratios {tried} up to which {self.metric} ({self.dense:.4g} dense) gets\n"
            f"# worse by no more than {self.tolerance:.2%} of that when the layer alone is pruned.\n"
            "# All of them together cost more.\n"
        )
        return rule + yaml.safe_dump({"pruning": self.pruning()}, sort_keys=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"format_version": FORMAT_VERSION, **asdict(self), "pruning": self.pruning()}

    def plot(self, path: str | os.PathLike) -> Path:
        """Writes a PNG of the metric by layer and ratio; it appears under its name only when it is complete."""
        from hfprune.report.heatmaps import sensitivity_plot

        return sensitivity_plot(self.to_dict(), path)

    def table(self) -> Stack:
        """For `rich.print`: one row a layer, one column a ratio, and the ratio chosen."""
        known = [value for entry in self.layers.values() for value in entry.values if value is not None]
        share = is_fraction(self.metric, [self.dense, *known])

        def show(value: float | None) -> str:
            return percent(value) if share else UNKNOWN if value is None else f"{value:.4g}"

        table = Table(
            title=f"{self.model}: {title(self.metric)} with one layer pruned, dense {show(self.dense)}",
            title_justify="left",
        )
        for number, column in enumerate(("layer", "units", *(f"{ratio:g}" for ratio in self.ratios), "chosen")):
            table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
        for name, entry in self.layers.items():
            more = f" (+{len(entry.groups) - 1})" if len(entry.groups) > 1 else ""
            table.add_row(name + more, f"{entry.units:,}", *(show(v) for v in entry.values), f"{entry.chosen:g}")
        lines = [f"note: {self.note}"] if self.note else []
        lines.append(
            f"chosen: the largest ratio up to which the metric gets worse by no more than {self.tolerance:.2%} of "
            f"the dense value; {self.ratio:.1%} of all units"
        )
        return Stack(table, *lines)
