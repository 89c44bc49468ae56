"""Methods compared, as pictures: the metric over the size, a panel a method, and over the measured speed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from hfprune.report.canvas import BLUE, GREY, INK, ORANGE, write_png
from hfprune.report.plots import PERCENT
from hfprune.report.strategies import error_bars, figure_of, finish

_COLORS = (BLUE, ORANGE, "#4f9d69", "#7a5ea8", "#b3475a", "#8c6d31")
_STYLES, _MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D", "v", "P")


def sizes_plot(report: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Writes a PNG of the metric over the size: a panel a method, a colour a criterion, a line style a schedule, bars
    the standard deviation over seeds, the dense level dotted. The file appears under its name only when it is complete.

    Args:
        report: as `AxesComparison.to_dict` gives it.
        path: of the PNG.
    """
    groups = [group for group in report["groups"] if group["mean"] is not None]
    methods = list(dict.fromkeys(group["method"] for group in groups))
    schedules = sorted({group["schedule"] for group in groups})
    lengths = sorted({group["length"] for group in groups})
    criteria = sorted({group["criterion"] for group in groups})
    figure, axes, scale = figure_of(report, len(methods))
    for place, method in zip(axes, methods, strict=False):
        for criterion in criteria:
            for number, schedule in enumerate(schedules):
                for marker, length in zip(_MARKERS * len(lengths), lengths, strict=False):
                    wanted = (method, criterion, schedule, length)
                    line = [g for g in groups if (g["method"], g["criterion"], g["schedule"], g["length"]) == wanted]
                    line.sort(key=lambda group: group["size"])
                    label = f"{criterion} {schedule}" + (f", {length}" if len(lengths) > 1 else "")
                    color = _COLORS[criteria.index(criterion) % len(_COLORS)]
                    if line:
                        sizes = [100 * group["size"] for group in line]
                        error_bars(place, sizes, line, scale, color, marker, _STYLES[number % len(_STYLES)], label)
        place.set_title(method, loc="left", fontsize=10)
        place.set_xlabel("size, of the parameters")
        place.xaxis.set_major_formatter(PERCENT)
        place.set_xticks(sorted({100 * group["size"] for group in groups})[:8])
        place.invert_xaxis()
    finish(figure, axes, report, scale)
    _alike(axes, groups, scale)
    return write_png(figure, path)


def speed_plot(report: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Writes a PNG of the metric over the speed-up at the largest batch size: a colour a method, a marker a size, the
    Pareto front in steps, the dense model as a star. The file appears under its name only when it is complete.

    Args:
        report: as `AxesComparison.to_dict` gives it.
        path: of the PNG.
    """
    groups = [group for group in report["groups"] if group["mean"] is not None and group["speedup"]]
    methods = list(dict.fromkeys(group["method"] for group in groups))
    sizes = sorted({group["size"] for group in groups}, reverse=True)
    figure, axes, scale = figure_of(report, 1)
    figure.set_size_inches(10.4, 5.2)
    place, batch = axes[0], ""
    for method in methods:
        for size in sizes:
            here = [group for group in groups if (group["method"], group["size"]) == (method, size)]
            color, marker = _COLORS[methods.index(method) % len(_COLORS)], _MARKERS[sizes.index(size) % len(_MARKERS)]
            for group in here:
                batch = max(group["speedup"], key=int)
                label = f"{method}, {100 * size:g} %"
                error_bars(place, [group["speedup"][batch]], [group], scale, color, marker, "none", label)
    names = [tuple(name) for name in report["pareto"]["speed"]]
    by_name = {(g["method"], g["criterion"], g["schedule"], g["size"], g["length"]): g for g in groups}
    front = sorted((by_name[n]["speedup"][batch], scale * by_name[n]["mean"]) for n in names if n in by_name)
    if len(front) > 1:
        place.step(*zip(*front, strict=True), where="pre", color=INK, linewidth=0.9, linestyle=":", label="front")
    if report["dense"] is not None:
        place.plot([1.0], [scale * report["dense"]], marker="*", markersize=11, color=GREY, linestyle="none")
    place.set_xlabel(f"times as fast as the dense model, batch {batch}" if batch else "speed")
    finish(figure, axes, report, scale)
    _alike(axes, groups, scale)
    return write_png(figure, path)


def _alike(axes: list[Axes], groups: Sequence[Mapping[str, Any]], scale: float) -> None:
    """One range for the metric in all axes; logarithmic where a metric without a bound has doubled."""
    means = [group["mean"] for group in groups]
    if scale == 1 and means and 0 < 2 * min(means) < max(means):
        for place in axes:
            place.set_yscale("log")
            place.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            place.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            place.yaxis.set_minor_formatter(NullFormatter())
    limits = [limit for place in axes for limit in place.get_ylim()]
    for place in axes:
        place.set_ylim(min(limits), max(limits))
