"""Strategies compared, as pictures: the metric over the ratio by schedule, and over what the runs cost."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from hfprune.report.canvas import BLUE, GREY, INK, ORANGE, sheet, write_png
from hfprune.report.plots import PERCENT
from hfprune.report.tables import is_fraction, title

_COLORS = {"one_shot": GREY, "constant": "#7a5ea8", "geometric": BLUE, "hybrid": ORANGE, "cubic": "#4f9d69"}
_MARKERS = ("o", "s", "^", "D", "v", "P")
_ACROSS, _MOST_PANELS, _MOST_TICKS = 3, 12, 6


def ratios_plot(report: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Writes a PNG of the metric over the ratio: a line a schedule, a panel a criterion and length, bars the standard
    deviation over seeds, the dense level dotted. The file appears under its name only when it is complete.

    Args:
        report: as `Comparison.to_dict` gives it.
        path: of the PNG.
    """
    groups = [group for group in report["groups"] if group["mean"] is not None]
    panels = list(dict.fromkeys((group["criterion"], group["length"]) for group in groups))[:_MOST_PANELS]
    figure, axes, scale = figure_of(report, len(panels))
    for place, (criterion, length) in zip(axes, panels, strict=False):
        here = [group for group in groups if (group["criterion"], group["length"]) == (criterion, length)]
        schedules = list(dict.fromkeys(group["schedule"] for group in here))
        ratios = sorted({100 * group["ratio"] for group in here})
        for number, schedule in enumerate(schedules):
            line = sorted((g for g in here if g["schedule"] == schedule), key=lambda g: g["ratio"])
            aside = _aside(place, ratios, number, len(schedules))
            color = _COLORS.get(schedule, INK)
            error_bars(place, [100 * g["ratio"] + aside for g in line], line, scale, color, "o", "-", schedule)
        place.set_title(f"{criterion}, {length}", loc="left", fontsize=10)
        place.set_xlabel("pruned")
        place.xaxis.set_major_formatter(PERCENT)
    finish(figure, axes, report, scale)
    return write_png(figure, path)


def budget_plot(report: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Writes a PNG of the metric over the epochs of fine-tuning spent, a panel a ratio: a point a strategy, lines
    joining the budgets of one, the Pareto front in steps. The file appears under its name only when it is complete.

    Args:
        report: as `Comparison.to_dict` gives it.
        path: of the PNG.
    """
    groups = [group for group in report["groups"] if group["mean"] is not None]
    ratios = sorted({group["ratio"] for group in groups})[:_MOST_PANELS]
    criteria = list(dict.fromkeys(group["criterion"] for group in groups))
    figure, axes, scale = figure_of(report, len(ratios))
    for place, ratio in zip(axes, ratios, strict=False):
        here = [group for group in groups if group["ratio"] == ratio]
        strategies = list(dict.fromkeys((group["criterion"], group["schedule"]) for group in here))
        epochs = sorted({group["costs"]["epochs"] for group in here})
        for number, (criterion, schedule) in enumerate(strategies):
            of = [g for g in here if (g["criterion"], g["schedule"]) == (criterion, schedule)]
            line = sorted(of, key=lambda g: g["costs"]["epochs"])
            label = schedule if len(criteria) == 1 else f"{criterion} {schedule}"
            marker = _MARKERS[criteria.index(criterion) % len(_MARKERS)]
            aside = _aside(place, epochs, number, len(strategies))
            color = _COLORS.get(schedule, INK)
            places = [g["costs"]["epochs"] + aside for g in line]
            error_bars(place, places, line, scale, color, marker, "-", label)
        names = report["pareto"]["epochs"].get(f"{ratio:g}", [])
        front = [g for g in here if [g["criterion"], g["schedule"], g["length"]] in names]
        front.sort(key=lambda g: g["costs"]["epochs"])
        points = [(g["costs"]["epochs"], scale * g["mean"]) for g in front]
        if len(points) > 1:
            place.step(*zip(*points, strict=True), where="post", color=INK, linewidth=0.9, linestyle=":", zorder=1)
        place.set_title(f"{100 * ratio:g} % pruned", loc="left", fontsize=10)
        place.set_xlabel("epochs of fine-tuning")
    finish(figure, axes, report, scale)
    return write_png(figure, path)


def _aside(axes: Axes, places: Sequence[float], number: int, count: int) -> float:
    """How far the points of one line of several stand beside their places, so that none hides another; the axis is set
    to the places."""
    span = places[-1] - places[0] or places[0] or 1.0
    axes.set_xlim(places[0] - 0.12 * span, places[-1] + 0.12 * span)
    if len(places) <= _MOST_TICKS:
        axes.set_xticks(places)
    return 0.014 * span * (number - (count - 1) / 2)


def figure_of(report: Mapping[str, Any], count: int) -> tuple[Any, list[Axes], float]:
    """A figure with so many axes, and what values are multiplied by to be shown."""
    across = max(1, min(count, _ACROSS))
    down = max(1, -(-count // _ACROSS))
    figure = sheet(2.2 + 3.6 * across, 1.0 + 3.2 * down)
    axes = [figure.add_subplot(down, across, number + 1) for number in range(max(1, count))]
    means = [group["mean"] for group in report["groups"] if group["mean"] is not None]
    return figure, axes, 100.0 if is_fraction(report["metric"], [report["dense"], *means]) else 1.0


def error_bars(
    axes: Axes,
    x: Sequence[float],
    groups: Sequence[Mapping[str, Any]],
    scale: float,
    color: str,
    marker: str,
    style: str,
    label: str,
) -> None:
    """A line of means, with the standard deviations over seeds as bars."""
    axes.errorbar(
        x,
        [scale * group["mean"] for group in groups],
        yerr=[scale * (group["sd"] or 0.0) for group in groups],
        color=color,
        marker=marker,
        markersize=5.5,
        linestyle=style,
        linewidth=1.5,
        capsize=2.5,
        elinewidth=1.0,
        label=label,
        zorder=3,
    )


def finish(figure: Any, axes: list[Axes], report: Mapping[str, Any], scale: float) -> None:
    """The dense level, the metric's axis and one legend for all axes."""
    for place in axes:
        place.spines[["top", "right"]].set_visible(False)
        place.spines[["left", "bottom"]].set_color(GREY)
        place.tick_params(colors=INK, labelsize=8.5)
        place.grid(color="#e4e7eb", linewidth=0.8, zorder=0)
        if report["dense"] is not None:
            place.axhline(scale * report["dense"], color=GREY, linewidth=1.1, linestyle=":", label="dense")
        if scale == 100:
            place.yaxis.set_major_formatter(PERCENT)
            continue
        means = [group["mean"] for group in report["groups"] if group["mean"] is not None]
        if means and 0 < 20 * min(means) < max(means):
            place.set_yscale("log")
        place.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes[0].set_ylabel(title(report["metric"]))
    lines = {}
    for place in axes:
        handles, labels = place.get_legend_handles_labels()
        lines |= dict(zip(labels, handles, strict=True))
    figure.legend(lines.values(), lines.keys(), frameon=False, fontsize=8.5, ncols=5, loc="outside lower left")
