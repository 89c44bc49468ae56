"""What all pictures share: colours, paper, names that fit, and files that are complete or not there."""

from __future__ import annotations

import os
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hfprune.checkpoint.files import whole_file

BLUE, ORANGE, GREY, INK = "#2f6db3", "#d9702b", "#8a8f98", "#24292f"


def sheet(width: float, height: float) -> Figure:
    """An empty white figure of so many inches."""
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def drawing(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one pair of axes."""
    figure = sheet(width, height)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=8.5)
    axes.title.set_fontsize(10.5)
    return figure, axes


def short_name(name: str, most: int = 48) -> str:
    """A tensor's name without `.weight`; the middle of a very long one is left out."""
    name = name.removesuffix(".weight")
    half = most // 2 - 1
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"


def write_png(figure: Figure, path: str | os.PathLike) -> Path:
    """Writes a figure; the file appears under its name only when it is complete."""
    path = Path(path)
    with whole_file(path) as side:
        figure.savefig(side, format="png")
    return path
