"""The page of a report in the wild: one HTML file that needs nothing else, for phones and screens, light and dark."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from hfprune import __version__
from hfprune.wild import report_tables as tables

TEMPLATE = "page.html.jinja"
MOST_ROWS, MOST_RANKED = 30, 8
"""Suspects and reasons, and slices of each pruned model, that are shown; the JSON holds all."""
_STEPS = (0.01, 0.03, 0.06, 0.12)
"""Increases of the mean WER from which a cell is shaded more."""


def render_page(data: Mapping[str, Any]) -> str:
    """The page's text; every text of the run is escaped, and nothing is loaded from elsewhere.

    Args:
        data: as `WildReport` has it.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "share": tables.share,
        "points": tables.points,
        "memory": tables.memory,
        "minutes": _minutes,
        "direction": direction,
    }
    environment.globals |= {"span": tables.span, "shade": shade}
    template = environment.from_string(Path(__file__).with_name(TEMPLATE).read_text(encoding="utf-8"))
    ranked = tables.worst_of(data, MOST_RANKED)
    return template.render(
        data=data,
        version=__version__,
        heading=tables.heading(data),
        notes=tables.notes(data),
        ranked=[(entry, rows, lines(rows)) for entry, (_, rows) in zip(_pruned(data, ranked), ranked, strict=True)],
        most=MOST_ROWS,
        by_chance=_by_chance(data["ranked"]),
        unpaired={"mean": None, "median": None, "sd": None, "interval": None, "count": 0},
    )


def _pruned(data: Mapping[str, Any], ranked: Sequence[tuple[str, Any]]) -> list[Mapping[str, Any]]:
    """The totals of the models that are ranked."""
    totals = {entry["model"]: entry for entry in data["totals"]["all"]}
    return [totals[model] for model, _ in ranked]


def shade(entry: Mapping[str, Any]) -> int:
    """How dark a cell is, 0 to 4: only where the interval of the increase lies above 0."""
    paired = entry["paired"]
    if not paired or paired["interval"] is None or paired["interval"][0] <= 0:
        return 0
    return sum(paired["mean"] >= step for step in _STEPS)


def lines(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where each row's interval lies in a drawing that is 100 wide: `zero`, and `low`, `mean`, `high` of every row."""
    ends = [value for row in rows for value in (row["mean"], *(row["interval"] or ()))]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    width = (high - low) or 1.0

    def place(value: float) -> float:
        return round(2 + 96 * (value - low) / width, 2)

    def of(row: Mapping[str, Any]) -> dict[str, float]:
        start, end = row["interval"] or (row["mean"], row["mean"])
        return {"low": place(start), "mean": place(row["mean"]), "high": place(end)}

    return {"zero": place(0.0), "rows": [of(row) for row in rows]}


def direction(columns: Sequence[Any]) -> str:
    """`rtl` where most letters of the reference are written from the right, else `ltr`."""
    turns = [unicodedata.bidirectional(letter) for column in columns for letter in column.reference]
    return "rtl" if sum(t in ("R", "AL") for t in turns) > turns.count("L") else "ltr"


def _by_chance(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How many slices were looked at, and how many intervals would lie above 0 if pruning changed nothing."""
    looked = sum(not row["few"] for row in rows)
    return {"looked": looked, "expected": looked * 0.025, "found": sum(row["certain"] for row in rows)}


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{seconds:.1f} s"
