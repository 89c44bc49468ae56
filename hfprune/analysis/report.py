"""Similarity: what a comparison of criteria found, as flags in words, tables, plain values and a picture."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group as Stack
from rich.table import Table

from hfprune.analysis.figures import Agreement, Dispersion, Normality

FORMAT_VERSION = 1
ALIKE_RHO, ALIKE_OVERLAP = 0.90, 0.80
"""Two criteria with this rank correlation and this overlap or more are interchangeable."""
NEAR = 1.25
"""A dispersion of at most this many times that of Gaussian weights tells nothing."""
GAUSSIAN_P = 0.05
_MOST_ROWS, _MOST_NAMES = 40, 3
UNKNOWN = "–"

Pair = tuple[str, str]


@dataclass(frozen=True)
class Similarity:
    """What `similarity` found.

    Every pair of criteria is compared by Spearman's rho, Kendall's tau, the overlap of what would be pruned and the
    Jaccard index of the masks, within each layer or group and over all of them ranked together; a random pair overlaps
    by the ratio itself. Every criterion is looked at for its dispersion beside that of Gaussian weights, and for layers
    that a global ranking would empty.

    Attributes:
        model: its class.
        criteria: those compared, in the order given.
        ratio: the fraction of the units that would go; two random choices overlap by as much.
        granularity, normalize, sample, seed: as asked for.
        layers: layer or group to its number of units.
        within: pair of criteria to layer to their agreement when every layer is pruned by the ratio.
        together: pair of criteria to their agreement when all layers are ranked together.
        dispersion: criterion to layer to the spread of its scores; `dispersion_together` over all layers.
        emptied: criterion to the layers of which a global ranking would leave nothing.
        costs: criterion to what it needs: 0 single weights, 1 whole layers or the model, 2 data.
        single_weights: whether a unit is one weight.
        normality: weight to the test of its values; None where it has too few.
        note: why the granularity is not the usual one.
    """

    model: str
    criteria: tuple[str, ...]
    ratio: float
    granularity: tuple[str, ...]
    normalize: str
    layers: dict[str, int]
    sample: int
    seed: int
    within: dict[Pair, dict[str, Agreement]]
    together: dict[Pair, Agreement]
    dispersion: dict[str, dict[str, Dispersion]]
    dispersion_together: dict[str, Dispersion]
    emptied: dict[str, tuple[str, ...]]
    costs: dict[str, int]
    single_weights: bool
    normality: dict[str, Normality | None] = field(default_factory=dict)
    note: str = ""

    @property
    def random_jaccard(self) -> float:
        """What the Jaccard index of two random choices would be, about."""
        return self.ratio / (2 - self.ratio)

    def mean_within(self, pair: Pair) -> Agreement:
        """The agreement of a pair within layers: the mean over the layers, each counting the same.

        Overlap and Jaccard index are weighed by what goes, so that they are those of the whole choice.
        """
        found = list(self.within[pair].values())
        goes = [round(self.ratio * entry.units) for entry in found]
        return Agreement(
            _mean(entry.spearman for entry in found),
            _mean(entry.kendall for entry in found),
            _mean((entry.overlap for entry in found), goes),
            _mean((entry.jaccard for entry in found), goes),
            sum(entry.units for entry in found),
        )

    def undecided(self, criterion: str) -> list[str]:
        """The layers whose units the criterion can't tell apart: its scores spread as those of Gaussian weights do, or
        not at all.

        The scores of single weights spread by the weights themselves, with nothing averaged, so there only scores that
        are all alike count.
        """

        def near(entry: Dispersion) -> bool:
            floor = 0.0 if self.single_weights else NEAR * (entry.floor or 0.0)
            return entry.cv is not None and entry.cv <= floor

        return [name for name, entry in self.dispersion[criterion].items() if near(entry)]

    @property
    def flags(self) -> list[str]:
        """What follows from the figures, one line each."""
        return [*self._interchangeable(), *self._cannot_discriminate(), *self._collapses()]

    def _interchangeable(self) -> list[str]:
        lines = []
        for pair, together in self.together.items():
            within = self.mean_within(pair)
            where = [words for words, entry in (("within layers", within), ("over all", together)) if _alike(entry)]
            if where:
                costs = [self.costs[name] for name in pair]
                which = pair[costs.index(min(costs))] if costs[0] != costs[1] else "both need the same"
                names, where = " and ".join(pair), " and ".join(where)
                lines.append(f"{names}: interchangeable {where}, take the cheaper ({which})")
        return lines

    def _cannot_discriminate(self) -> list[str]:
        lines = []
        for criterion in self.criteria:
            if names := self.undecided(criterion):
                where = _listed(names) if len(names) < len(self.layers) else "every layer"
                lines.append(
                    f"{criterion}: cannot discriminate in {where}: its scores are all alike, or spread no more than "
                    f"{NEAR:g} times those of Gaussian weights"
                )
        return lines

    def _collapses(self) -> list[str]:
        return [
            f"{criterion}: global ranking would empty layer {_listed(names)}"
            for criterion, names in self.emptied.items()
            if names
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "format_version": FORMAT_VERSION,
            **{key: getattr(self, key) for key in ("model", "ratio", "normalize", "sample", "seed", "note")},
            "criteria": list(self.criteria),
            "granularity": list(self.granularity),
            "layers": self.layers,
            "random": {"overlap": self.ratio, "jaccard": self.random_jaccard},
            "pairs": [
                {
                    "criteria": list(pair),
                    "global": asdict(self.together[pair]),
                    "within": asdict(self.mean_within(pair)),
                    "layers": {name: asdict(entry) for name, entry in self.within[pair].items()},
                }
                for pair in self.together
            ],
            "dispersion": {
                criterion: {
                    "global": asdict(self.dispersion_together[criterion]),
                    "layers": {name: asdict(entry) for name, entry in entries.items()},
                    "cannot_discriminate": self.undecided(criterion),
                    "emptied": list(self.emptied[criterion]),
                }
                for criterion, entries in self.dispersion.items()
            },
            "normality": {n: None if entry is None else asdict(entry) for n, entry in self.normality.items()},
            "flags": self.flags,
        }

    def plot(self, path: str | os.PathLike) -> Path:
        """Writes a PNG of the rank correlations and overlaps; it appears under its name only when it is complete."""
        from hfprune.report.heatmaps import similarity_plot

        return similarity_plot(self.to_dict(), path)

    def table(self) -> Stack:
        """For `rich.print`: the pairs, the criteria, the layers, and the flags in words."""
        heading = (
            f"{self.model}: {sum(self.layers.values()):,} units ({', '.join(self.granularity)}) in {len(self.layers)} "
            f"layers, of which {self.ratio:g} would go"
        )
        parts: list[Any] = [heading, *([self._pairs()] if self.together else [])]
        parts += [self._criteria(), self._layers(), *self._words()]
        return Stack(*parts)

    def _pairs(self) -> Table:
        columns = ("criteria", "ranked", "Spearman", "Kendall", "overlap", "Jaccard")
        table = _table("how alike they rank", columns, words=2)
        for pair, together in self.together.items():
            name = f"{pair[0]} – {pair[1]}"
            for words, entry in (("within layers", self.mean_within(pair)), ("over all", together)):
                values = (entry.spearman, entry.kendall, entry.overlap, entry.jaccard)
                table.add_row(name, words, *(_two(value) for value in values))
                name = ""
        table.add_section()
        table.add_row("at random", "", "0.00", "0.00", _two(self.ratio), _two(self.random_jaccard))
        return table

    def _criteria(self) -> Table:
        columns = ("criterion", "CV", "Gaussian CV", "gap", "Gaussian gap", "CV over all", "undecided", "emptied")
        table = _table("spread of the scores in a layer (medians)", columns, words=1)
        for criterion in self.criteria:
            entries = list(self.dispersion[criterion].values())
            medians = [_median(getattr(e, key) for e in entries) for key in ("cv", "floor", "gap", "gap_floor")]
            counts = [f"{len(names)}" for names in (self.undecided(criterion), self.emptied[criterion])]
            table.add_row(
                criterion, *(_three(v) for v in medians), _three(self.dispersion_together[criterion].cv), *counts
            )
        return table

    def _layers(self) -> Table:
        pairs = list(self.within)
        table = _table("layers", ("layer", "units", "Spearman, mean", "least alike pair", "its Spearman"), words=1)
        for name, units in list(self.layers.items())[:_MOST_ROWS]:
            known = {pair: v for pair in pairs if (v := self.within[pair][name].spearman) is not None}
            least = min(known, key=lambda pair: known[pair]) if known else None
            words = UNKNOWN if least is None else " – ".join(least)
            low = None if least is None else known[least]
            table.add_row(name, f"{units:,}", _two(_mean(known.values())), words, _two(low))
        if (rest := len(self.layers) - _MOST_ROWS) > 0:
            table.add_row(f"{rest} more", "", "", "", "")
        return table

    def _words(self) -> list[str]:
        tested = {name: entry for name, entry in self.normality.items() if entry is not None}
        gaussian = [name for name, entry in tested.items() if entry.p >= GAUSSIAN_P]
        lines = [f"note: {self.note}"] if self.note else []
        if max(self.layers.values()) > self.sample or sum(self.layers.values()) > self.sample:
            lines.append(f"rank correlations of more than {self.sample:,} units are those of a sample of so many")
        lines.append(
            f"weights that can't be told from Gaussian ones (p >= {GAUSSIAN_P:g}): {len(gaussian)} of {len(tested)}"
            f"{f': {_listed(gaussian)}' if gaussian else ''}"
        )
        return lines + [f"* {flag}" for flag in self.flags]


def _alike(entry: Agreement) -> bool:
    if entry.spearman is None or entry.overlap is None:
        return False
    return entry.spearman >= ALIKE_RHO and entry.overlap >= ALIKE_OVERLAP


def _mean(values: Iterable[float | None], weights: Iterable[float] | None = None) -> float | None:
    values = list(values)
    known = [(v, w) for v, w in zip(values, weights or [1] * len(values), strict=True) if v is not None and w]
    return sum(v * w for v, w in known) / sum(w for _, w in known) if known else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def _two(value: float | None) -> str:
    return UNKNOWN if value is None else f"{round(value, 2) + 0.0:.2f}"


def _three(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3g}"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _table(title: str, columns: Iterable[str], words: int) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < words else "right", overflow="fold")
    return table
