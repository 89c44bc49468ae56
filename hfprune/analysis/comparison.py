"""Comparison: what the runs of a grid say, in groups over seeds, fronts, sentences, tables and pictures."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Group as Stack
from rich.table import Table

from hfprune.analysis.verdicts import Claim, Group, Measure, claims, sentence
from hfprune.checkpoint.files import side_folder, write_text
from hfprune.report.tables import UNKNOWN, is_fraction, title

FORMAT_VERSION = 1
COSTS = ("epochs", "optimizer_steps", "seconds", "scoring_batches")
_COLUMNS = (
    "criterion",
    "schedule",
    "ratio",
    "budget",
    "patience",
    "seed",
    "value",
    "dense",
    "achieved",
    *COSTS,
    "failed",
)


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        runs: the results of the runs that are complete, as they lie on disk.
        planned: how many runs the grid has.
    """

    runs: Sequence[dict[str, Any]]
    planned: int = field(default=0)

    @cached_property
    def measure(self) -> Measure:
        """The metric, its direction, the dense model's value and how values are shown."""
        first = self.runs[0] if self.runs else {}
        name = first.get("main_metric", "loss")
        known = [run["value"] for run in self.runs if run["value"] is not None]
        dense = first.get("dense", math.nan)
        share = is_fraction(name, [dense, *known])
        return Measure(name, first.get("greater_is_better", False), dense, share)

    @cached_property
    def groups(self) -> list[Group]:
        """The runs that differ only in their seed, together; by criterion, length, ratio and schedule as they came."""
        found: dict[tuple, list[dict[str, Any]]] = {}
        for run in self.runs:
            length = ("budget", run["budget"]) if run["budget"] is not None else ("patience", str(run["patience"]))
            found.setdefault((run["ratio"], length, run["criterion"], run["schedule"]), []).append(run)
        order = sorted(found, key=lambda key: (key[0], str(key[1][0]), _number(key[1][1])))
        return [self._group(key, found[key]) for key in order]

    def _group(self, key: tuple, runs: list[dict[str, Any]]) -> Group:
        ratio, (kind, length), criterion, schedule = key
        words = f"{length:g} epochs" if kind == "budget" else f"patience {length}"
        good = [run for run in runs if run["value"] is not None]
        costs = {name: _mean([run["cost"][name] for run in good]) for name in COSTS}
        values = tuple(run["value"] for run in good)
        steps = max(len(run["targets"]) for run in runs)
        return Group(criterion, schedule, ratio, words, values, costs, len(runs) - len(good), steps)

    @cached_property
    def sentences(self) -> list[str]:
        """One for every ratio and length: which strategy won, by how much, and whether the seeds spread less."""
        several = len({group.criterion for group in self.groups}) > 1
        places = dict.fromkeys((group.ratio, group.length) for group in self.groups)
        many = len({length for _, length in places}) > 1
        return [
            sentence(self.measure, [one for one in self.groups if (one.ratio, one.length) == place], several, many)
            for place in places
        ]

    @cached_property
    def claims(self) -> list[Claim]:
        """The source's claims on schedules, each confirmed, not confirmed or undecided by these runs."""
        first = self.runs[0] if self.runs else {}
        return claims(self.measure, self.groups, first.get("family", "other"), first.get("removal", False))

    def front(self, ratio: float, cost: str = "epochs") -> list[Group]:
        """The strategies at a ratio that no other beats in the metric at the same cost or less, the cheapest first."""
        sign = 1 if self.measure.greater_is_better else -1
        groups = [group for group in self.groups if group.ratio == ratio and group.values]
        points = [(group.costs[cost], sign * group.mean) for group in groups]
        kept = [
            group
            for group, (spent, good) in zip(groups, points, strict=True)
            if not any(c <= spent and g >= good and (c, g) != (spent, good) for c, g in points)
        ]
        return sorted(kept, key=lambda group: group.costs[cost])

    @property
    def ratios(self) -> list[float]:
        """The ratios, ascending."""
        return sorted({group.ratio for group in self.groups})

    def table(self) -> Stack:
        """For `rich.print`: one row a strategy and ratio, then the sentences and the claims."""
        measure = self.measure
        table = Table(title=f"{title(measure.name)}, dense {measure.show(measure.dense)}", title_justify="left")
        several = len({group.length for group in self.groups}) > 1 or not self.groups
        columns = ["ratio", "criterion", "schedule", *(["length"] if several else []), "steps", "mean", "sd", "seeds"]
        for number, column in enumerate([*columns, "epochs", "opt. steps", "seconds", "scored", "front"]):
            table.add_column(column, justify="left" if 0 < number < 3 else "right")
        for ratio in self.ratios:
            fronts = {cost: self.front(ratio, cost) for cost in ("epochs", "seconds")}
            for group in (group for group in self.groups if group.ratio == ratio):
                marks = " ".join(cost for cost, front in fronts.items() if group in front)
                table.add_row(*self._cells(group, several), marks)
            table.add_section()
        lines = [] if several or not self.groups else [f"every run: {self.groups[0].length} of fine-tuning in all"]
        if self.groups and not several and self.groups[0].length.startswith("patience"):
            lines = [f"every pruning step: {self.groups[0].length}"]
        if (missing := self.planned - len(self.runs)) > 0:
            lines.append(f"{missing} of {self.planned} runs are still to be made")
        lines.append("scored: batches seen for scores; front: nothing at that ratio is better for as few epochs, or "
                     "as few seconds")  # fmt: skip
        said = [f"* {text}" for text in self.sentences]
        judged = [f"{claim.number}. {claim.text}: {claim.verdict}. {claim.numbers}" for claim in self.claims]
        return Stack(table, *lines, *said, "the claims of arXiv 2508.13836 on these runs:", *judged)

    def _cells(self, group: Group, several: bool) -> list[str]:
        costs, show = group.costs, self.measure.show
        seeds = f"{len(group.values)}" + (f" (+{group.failed} failed)" if group.failed else "")
        spread = UNKNOWN if group.sd is None else self.measure.difference(group.sd)
        cells = [f"{group.ratio:.4g}", group.criterion, group.schedule, *([group.length] if several else [])]
        cells += [str(group.steps), show(group.mean), spread, seeds]
        if not group.values:
            return [*cells, *[UNKNOWN] * 4]
        rest = f"{costs['epochs']:.4g}", f"{costs['optimizer_steps']:.0f}", f"{costs['seconds']:.1f}"
        return [*cells, *rest, f"{costs['scoring_batches']:.0f}"]

    def fronts(self) -> dict[str, Any]:
        """The fronts by what is spent, and by ratio: criterion, schedule and length of each strategy."""
        return {
            cost: {
                f"{ratio:g}": [[group.criterion, group.schedule, group.length] for group in self.front(ratio, cost)]
                for ratio in self.ratios
            }
            for cost in ("epochs", "optimizer_steps", "seconds")
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        measure = self.measure
        return {
            "format_version": FORMAT_VERSION,
            "metric": measure.name,
            "greater_is_better": measure.greater_is_better,
            "dense": measure.dense if math.isfinite(measure.dense) else None,
            "planned": self.planned,
            "groups": [group.to_dict() for group in self.groups],
            "pareto": self.fronts(),
            "sentences": self.sentences,
            "claims": [asdict(claim) for claim in self.claims],
            "runs": list(self.runs),
        }

    def to_csv(self) -> str:
        """One line a run, the columns named in the first."""
        text = io.StringIO()
        writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for run in self.runs:
            writer.writerow({**run, **run["cost"]})
        return text.getvalue()

    def save(self, folder: str | os.PathLike) -> list[str]:
        """Writes `compare.json`, `compare.csv` and the pictures; either all of them are there or none.

        Returns:
            Their names.
        """
        report, pictures = self.to_dict(), self.pictures()
        with side_folder(Path(folder)) as side:
            write_text(side / "compare.json", json.dumps(report, indent=2) + "\n")
            write_text(side / "compare.csv", self.to_csv())
            for name, draw in pictures.items():
                draw(report, side / name)
        return ["compare.json", "compare.csv", *pictures]

    def pictures(self) -> dict[str, Callable[[dict[str, Any], Path], Path]]:
        """Name to what draws it from a report."""
        from hfprune.report.strategies import budget_plot, ratios_plot

        return {"ratios.png": ratios_plot, "budget.png": budget_plot}


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) else 0.0
