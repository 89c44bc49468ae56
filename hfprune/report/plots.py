"""The report as pictures: zeros by layer, and the main metric along the pruning steps."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hfprune.report.canvas import BLUE, GREY, INK, ORANGE, drawing, short_name, write_png
from hfprune.report.tables import GONE, is_fraction, main_metric, metrics, title

KINDS = {"head": ORANGE, "head_dim": ORANGE, "neuron": BLUE, "width": "#4f9d69", "channel": "#7a5ea8"}
PERCENT = FuncFormatter(lambda value, _: f"{value:g} %")


def sparsity_plot(report: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Writes a PNG with one bar a tensor, in the model's order from the top: how much of it is zero.

    The file appears under its name only when it is complete. Up to 60 tensors each bar carries its value; beyond 120
    the height stays, and only every n-th bar carries its name.
    """
    entries = report.get("sparsity") or {}
    names = list(entries)
    values = [100 * entry["zeros"] / max(1, entry["numel"]) for entry in entries.values()]
    count = max(1, len(names))
    height = min(1.5 + 0.24 * count, 24.0)
    label_width = 0.075 * max((len(short_name(name)) for name in names), default=0)
    figure, axes = drawing(6.2 + label_width, height)
    axes.barh(range(len(names)), values, height=0.72, color=BLUE, zorder=2)
    axes.set_ylim(len(names) - 0.4, -0.6)
    every = max(1, -(-count // 120))
    size = 8 if count <= 90 else 7
    axes.set_yticks(range(0, len(names), every), [short_name(name) for name in names[::every]], fontsize=size)
    axes.tick_params(axis="y", length=0)
    zeros, numel = (sum(entry[key] for entry in entries.values()) for key in ("zeros", "numel"))
    overall = 100 * zeros / max(1, numel)
    axes.axvline(overall, color=ORANGE, linewidth=1.4, linestyle="--", zorder=3)
    if count <= 60:
        for index, value in enumerate(values):
            axes.text(value + 1, index, f"{value:.0f}", va="center", fontsize=7.5, color=INK, zorder=4, bbox=_paper())
    axes.set_xlim(0, 107 if count <= 60 else 100)
    axes.set_xticks(range(0, 101, 20))
    axes.xaxis.set_major_formatter(PERCENT)
    axes.grid(axis="x", color="#e4e7eb", linewidth=0.8, zorder=0)
    axes.set_xlabel("zeros")
    axes.set_title(f"Zeros by tensor   (dashed: {overall:.1f} % of all {numel:,} values)", loc="left")
    return write_png(figure, path)


def units_plot(report: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Writes a PNG with one bar a coupled group, in the model's order from the top: how many of its units are left.

    The file appears under its name only when it is complete. Up to 60 groups each bar carries its numbers; beyond 120
    the height stays, and only every n-th bar carries its name.
    """
    groups = report["removed"]["groups"]
    names = list(groups)
    values = [100 * group["kept"] / max(1, group["units"]) for group in groups.values()]
    count = max(1, len(names))
    label_width = 0.075 * max((len(short_name(name)) for name in names), default=0)
    figure, axes = drawing(6.6 + label_width, min(1.7 + 0.26 * count, 24.0))
    kinds = list(dict.fromkeys(group["kind"] for group in groups.values()))
    axes.barh(range(len(names)), [100] * len(names), height=0.72, color="#eceff3", zorder=1)
    for kind in kinds:
        rows = [index for index, group in enumerate(groups.values()) if group["kind"] == kind]
        color = KINDS.get(kind, BLUE)
        axes.barh(rows, [values[row] for row in rows], height=0.72, color=color, zorder=2, label=f"{kind}s")
    axes.set_ylim(len(names) - 0.4, -0.6)
    every = max(1, -(-count // 120))
    axes.set_yticks(range(0, len(names), every), [short_name(name) for name in names[::every]])
    axes.tick_params(axis="y", length=0, labelsize=8 if count <= 90 else 7)
    if count <= 60:
        for index, group in enumerate(groups.values()):
            axes.text(101, index, f"{group['kept']:,} of {group['units']:,}", va="center", fontsize=7.5, color=INK)
    axes.set_xlim(0, 122 if count <= 60 else 100)
    axes.set_xticks(range(0, 101, 20))
    axes.xaxis.set_major_formatter(PERCENT)
    axes.set_xlabel("units kept")
    before, after = (sum(group[key] for group in groups.values()) for key in ("units", "kept"))
    axes.set_title(f"Units kept by group   ({after:,} of {before:,})", loc="left")
    if len(kinds) > 1:
        axes.legend(frameon=False, fontsize=8.5, ncols=4, loc="lower right", bbox_to_anchor=(1.01, 0.99))
    return write_png(figure, path)


def trajectory_plot(report: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Writes a PNG of the main metric over the pruned fraction: the dense level, and for each step the dashed way down
    by pruning and the way back by fine-tuning.

    A metric that spans more than a factor of 20 (perplexity right after pruning) has a logarithmic axis. The file
    appears under its name only when it is complete.
    """
    name = main_metric(report)
    dense = metrics((report.get("dense") or {}).get("metric")).get(name)
    points = [(step.get("achieved", step.get("target")), step) for step in report.get("steps") or []]
    before = [metrics(step.get("metric_before")).get(name) for _, step in points]
    after = [metrics(step.get("metric")).get(name) for _, step in points]
    scale = 100 if is_fraction(name, [dense, *before, *after]) else 1
    figure, axes = drawing(7.2, 4.4)
    place = (0.0, None if dense is None else dense * scale)
    if dense is not None:
        axes.axhline(place[1], color=GREY, linewidth=1.1, linestyle=":", zorder=1, label="dense")
        axes.plot(*place, "o", color=GREY, markersize=7, zorder=4)
    for (pruned, _), low, high in zip(points, before, after, strict=True):
        x = 100 * pruned
        for value, style in ((low, "pruning"), (high, "tuning")):
            if value is None:
                continue
            if place[1] is not None:
                _segment(axes, place, (x, value * scale), style)
            place = (x, value * scale)
    _points(axes, points, before, scale, ORANGE, "v", "right after pruning")
    _points(axes, points, after, scale, BLUE, "o", "after fine-tuning")
    axes.set_xlim(-2.5, max([10.0, *(100 * x + 4 for x, _ in points)]))
    shown = [value for value in (dense, *before, *after) if value is not None]
    if scale == 1 and shown and 0 < 20 * min(shown) < max(shown):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.margins(y=0.12)
    axes.set_xlabel(GONE[next((step.get("measured", "ratio") for _, step in points), "ratio")])
    axes.set_ylabel(title(name))
    axes.xaxis.set_major_formatter(PERCENT)
    if scale == 100:
        axes.yaxis.set_major_formatter(PERCENT)
    axes.grid(color="#e4e7eb", linewidth=0.8, zorder=0)
    axes.set_title(f"{title(name).capitalize()} along the pruning steps", loc="left")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8.5, ncols=3, loc="upper left", bbox_to_anchor=(-0.01, -0.15))
    return write_png(figure, path)


def _segment(axes: Axes, start: tuple, end: tuple, style: str) -> None:
    look = {"color": ORANGE, "linestyle": "--", "linewidth": 1.2}
    if style == "tuning":
        look = {"color": BLUE, "linestyle": "-", "linewidth": 1.8}
    axes.plot([start[0], end[0]], [start[1], end[1]], zorder=2, **look)


def _points(axes: Axes, points: list, values: list, scale: int, color: str, marker: str, label: str) -> None:
    known = [(100 * x, scale * value) for (x, _), value in zip(points, values, strict=True) if value is not None]
    if known:
        axes.plot(*zip(*known, strict=True), marker, color=color, markersize=6.5, zorder=3, label=label)


def _paper() -> dict[str, Any]:
    return {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
