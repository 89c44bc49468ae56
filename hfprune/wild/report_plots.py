"""A report in the wild as pictures: the word error rate by slice, and where pruning hurts most."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hfprune.report.canvas import BLUE, GREY, INK, ORANGE, drawing, sheet, short_name, write_png
from hfprune.report.plots import PERCENT
from hfprune.wild.report_tables import worst_of

_COLORS = (GREY, BLUE, ORANGE, "#4f9d69", "#7a5ea8", "#b23a68", "#2a9d9d", "#8d6e4a")
_MOST_PANELS, _MOST_SLICES, _MOST_RANKED, _MOST_NAME = 8, 12, 6, 34


def wer_plot(data: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Writes a PNG of the mean word error rates with their intervals: a panel a dimension, a point a model and slice.

    At most eight dimensions, and of each the twelve slices with most items. The file appears under its name only when
    it is complete.

    Args:
        data: as `WildReport` has it.
        path: of the PNG.
    """
    panels = {"all items": [{"name": "all", "items": data["items"], "models": data["totals"]["all"]}]}
    panels |= {name: _largest(parts) for name, parts in list(data["dimensions"].items())[: _MOST_PANELS - 1]}
    rows = [list(panels.items())[start : start + 2] for start in range(0, len(panels), 2)]
    each = 0.12 * len(data["models"]) + 0.2
    heights = [0.9 + each * max(len(parts) for _, parts in row) for row in rows]
    figure = sheet(11.5, 0.7 + sum(heights))
    grid = figure.add_gridspec(len(rows), 2, height_ratios=heights)
    for down, row in enumerate(rows):
        for across, (name, parts) in enumerate(row):
            _panel(figure.add_subplot(grid[down, across]), name, parts, data["models"])
    handles = [Line2D([], [], color=_color(n), marker="o", linewidth=1.5) for n in range(len(data["models"]))]
    if handles:
        names = [_words(model).lstrip("_") or "model" for model in data["models"]]
        legend = figure.legend(handles, names, frameon=False, fontsize=9, ncols=4, loc="outside lower left")
        for text in legend.get_texts():
            text.set_parse_math(False)
    return _written(figure, path)


def increase_plot(data: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Writes a PNG of the slices where pruning hurts each model most, with the intervals of the increase; those of too
    few items are hollow. The file appears under its name only when it is complete.

    Args:
        data: as `WildReport` has it, with more than one model.
        path: of the PNG.
    """
    groups = worst_of(data, _MOST_RANKED)
    figure, axes = drawing(9.0, 1.2 + sum(0.45 + 0.3 * len(rows) for _, rows in groups))
    names, place = {}, 0.0
    for model, rows in groups:
        color = _color(data["models"].index(model))
        names[place] = _words(model)
        for row in rows:
            place += 1
            low, high = row["interval"] or (row["mean"], row["mean"])
            axes.plot([100 * low, 100 * high], [place, place], color=color, linewidth=1.8, zorder=2)
            fill = "white" if row["few"] else color
            axes.plot(100 * row["mean"], place, "o", color=color, markerfacecolor=fill, markersize=6, zorder=3)
            names[place] = short_name(f"{row['dimension']}: {row['slice']}", 2 * _MOST_NAME)
        place += 1.5
    axes.axvline(0, color=GREY, linewidth=1.0, linestyle=":")
    axes.set_yticks(list(names), list(names.values()), fontsize=8.5, parse_math=False)
    for label, name in zip(axes.get_yticklabels(), names.values(), strict=True):
        if name in {_words(model) for model, _ in groups}:
            label.set_fontweight("bold")
    axes.set_ylim(place - 0.8, -0.8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e4e7eb", linewidth=0.8, zorder=0)
    axes.set_xlabel(
        f"increase of the word error rate over {_words(data['dense'])}, percentage points", parse_math=False
    )
    axes.set_title("Where pruning hurts most", loc="left")
    return _written(figure, path)


def _panel(axes: Axes, name: str, parts: Sequence[Mapping[str, Any]], models: Sequence[str]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=8.5)
    for number in range(len(models)):
        aside = 0.6 * ((number + 0.5) / len(models) - 0.5)
        for place, part in enumerate(parts):
            entry = part["models"][number]
            if entry["mean"] is None:
                continue
            low, high = entry["interval"] or (entry["mean"], entry["mean"])
            axes.plot([100 * low, 100 * high], [place + aside] * 2, color=_color(number), linewidth=1.4, zorder=2)
            axes.plot(100 * entry["mean"], place + aside, "o", color=_color(number), markersize=4, zorder=3)
    axes.set_yticks(
        range(len(parts)), [f"{_words(part['name'])} ({part['items']:,})" for part in parts], parse_math=False
    )
    axes.set_ylim(len(parts) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(PERCENT)
    axes.grid(axis="x", color="#e4e7eb", linewidth=0.8, zorder=0)
    axes.set_title(f"WER by {_words(name)}" if name != "all items" else "WER, mean of all items", loc="left",
                   fontsize=10, parse_math=False)  # fmt: skip


def _largest(parts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    kept = sorted(parts, key=lambda part: -part["items"])[:_MOST_SLICES]
    return [part for part in parts if part in kept]


def _color(number: int) -> str:
    return _COLORS[number % len(_COLORS)]


def _words(name: str) -> str:
    return short_name(name, _MOST_NAME)


def _written(figure: Figure, path: str | os.PathLike) -> Path:
    with warnings.catch_warnings():
        # The font that matplotlib brings has no Chinese, Japanese or Indic letters; the page shows them.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
        return write_png(figure, path)
