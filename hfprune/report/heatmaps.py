"""The analyses as pictures: how alike criteria are, and what every layer can lose."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from hfprune.report.canvas import GREY, INK, ORANGE, sheet, short_name, write_png
from hfprune.report.tables import is_fraction, title

_SHADES, _DIVERGING, _NOTHING = "Blues", "RdBu", "#eceff3"
_MOST_NUMBERS, _MOST_NAMES = 40, 120


def similarity_plot(report: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Writes a PNG of a comparison of criteria: rank correlations and overlaps of every pair, within layers below the
    diagonal and over all layers above it, and the rank correlation of every pair in every layer.

    The file appears under its name only when it is complete. Up to 40 layers each cell carries its number.

    Args:
        report: what `Similarity.to_dict` gives.
        path: of the PNG.
    """
    names, pairs, layers = list(report["criteria"]), report["pairs"], list(report["layers"])
    matrix_size = 1.1 + 0.62 * len(names)
    rows = min(1.2 + 0.22 * len(layers), 20.0) if pairs else 0.0
    label_width = 0.075 * max(len(short_name(name)) for name in layers)
    width = max(2 * matrix_size + 2.2, label_width + 1.2 + 0.62 * len(pairs), 6.4)
    figure = sheet(width, matrix_size + 0.9 + rows)
    if pairs:
        upper, lower = figure.subfigures(2, 1, height_ratios=[matrix_size + 0.9, rows])
    else:
        upper = figure
    left, right = upper.subplots(1, 2)
    chance = report["random"]["overlap"]
    _matrix(left, names, pairs, "spearman", (-1, 1), "rank correlation (Spearman)")
    _matrix(right, names, pairs, "overlap", (0, 1), f"overlap of what would go (by chance {chance:.2f})")
    upper.supxlabel("below the diagonal: within layers; above it: all layers ranked together", fontsize=8.5, color=INK)
    if pairs:
        values = np.array([[_number(pair["layers"][name]["spearman"]) for pair in pairs] for name in layers])
        axes = lower.subplots()
        _cells(axes, values, (-1, 1), _DIVERGING, _words(values))
        _names(axes, [short_name(name) for name in layers], ["\n".join(pair["criteria"]) for pair in pairs])
        axes.set_title("rank correlation in every layer", loc="left", fontsize=10.5)
    return write_png(figure, path)


def sensitivity_plot(report: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Writes a PNG of what the metric is after every layer or group alone was pruned at every ratio; the ratio chosen
    for each is framed.

    The file appears under its name only when it is complete. Up to 40 layers each cell carries its number.

    Args:
        report: what `Sensitivity.to_dict` gives.
        path: of the PNG.
    """
    layers, ratios = report["layers"], report["ratios"]
    names, dense = list(layers), report["dense"]
    values = np.array([[_number(entry["values"][i]) for i in range(len(ratios))] for entry in layers.values()])
    scale = 100 if is_fraction(report["metric"], [dense, *values[np.isfinite(values)].tolist()]) else 1
    words = [f"{scale * value:.1f}" if scale == 100 else f"{value:.4g}" for value in values.ravel()]
    label_width = 0.075 * max(len(short_name(name)) for name in names)
    figure = sheet(max(5.6, label_width + 1.8 + 0.75 * len(ratios)), min(1.6 + 0.24 * len(names), 24.0))
    axes = figure.add_subplot()
    known = values[np.isfinite(values)]
    ends = (min([dense, *known]), max([dense, *known]))
    colours = _SHADES if report["greater_is_better"] else f"{_SHADES}_r"
    _cells(axes, values, ends, colours, words)
    _names(axes, [short_name(name) for name in names], [f"{ratio:g}" for ratio in ratios])
    for row, entry in enumerate(layers.values()):
        if entry["chosen"] in ratios:
            place = (ratios.index(entry["chosen"]) - 0.5, row - 0.5)
            axes.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor=ORANGE, linewidth=1.8, zorder=4))
    unit = " %" if scale == 100 else ""
    axes.set_xlabel("fraction of this layer alone that is pruned", fontsize=8.5)
    axes.set_title(
        f"{title(report['metric']).capitalize()} when one layer is pruned   (dense: {scale * dense:.4g}{unit}; "
        f"framed: chosen)",
        loc="left",
        fontsize=10.5,
    )
    return write_png(figure, path)


def _matrix(
    axes: Axes,
    names: Sequence[str],
    pairs: Sequence[Mapping[str, Any]],
    key: str,
    ends: tuple[float, float],
    words: str,
) -> None:
    """Criteria by criteria: within layers below the diagonal, over all above it."""
    values = np.full((len(names), len(names)), np.nan)
    for pair in pairs:
        first, second = sorted(names.index(name) for name in pair["criteria"])
        values[second, first], values[first, second] = _number(pair["within"][key]), _number(pair["global"][key])
    colours = _DIVERGING if ends[0] < 0 else _SHADES
    _cells(axes, values, ends, colours, _words(values))
    _names(axes, names, names)
    axes.set_title(words, loc="left", fontsize=10)


def _cells(axes: Axes, values: np.ndarray, ends: tuple[float, float], colours: str, words: Sequence[str]) -> None:
    axes.set_facecolor(_NOTHING)
    axes.grid(False)
    axes.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=ends[0], vmax=ends[1], aspect="auto")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=INK)
    if len(values) > _MOST_NUMBERS:
        return
    span = (ends[1] - ends[0]) or 1.0
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            share = (value - ends[0]) / span
            # Light words on the dark ends: both ends of a diverging map, one end of the other.
            dark = abs(share - 0.5) > 0.3 if colours == _DIVERGING else (1 - share if "_r" in colours else share) > 0.6
            word = words[row * values.shape[1] + column]
            axes.text(column, row, word, ha="center", va="center", fontsize=7.5, color="white" if dark else INK)


def _names(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    every = max(1, -(-len(rows) // _MOST_NAMES))
    axes.set_yticks(range(0, len(rows), every), rows[::every], fontsize=8 if len(rows) <= 60 else 6.5)
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.xaxis.label.set_color(GREY)


def _words(values: np.ndarray) -> list[str]:
    """Two decimals each; no zero is negative."""
    return [f"{round(value, 2) + 0.0:.2f}" for value in values.ravel().tolist()]


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)
