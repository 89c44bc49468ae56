"""Granularities: what is removed at once, taken apart from its name in a recipe."""

from __future__ import annotations

import re
from typing import NamedTuple

from hfprune.errors import ConfigError

REMOVABLE = ("channel", "head", "head_dim", "neuron", "width", "layer")
"""Granularities whose units are parts of the model's structure."""

STRUCTURAL = (*REMOVABLE, "rank")
"""Granularities that make tensors smaller; several of them may stand in one recipe. The units of `rank` are the
components of weights that are written as a product of two."""


class Granularity(NamedTuple):
    """A granularity taken apart: `kind` is `weight`, `n:m`, `block` or one of STRUCTURAL; the other fields belong to
    `n:m` and `block`."""

    kind: str
    kept: int = 0
    group: int = 0
    rows: int = 0
    cols: int = 0


def parse_granularity(text: str) -> Granularity:
    """A structural name, `weight`, `2:4` (2 kept of every 4 along the input dimension) or `block:4x4` (rows x columns).

    Raises:
        ConfigError: for anything else.
    """
    if text == "weight" or text in STRUCTURAL:
        return Granularity(text)
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        kept, group = int(match[1]), int(match[2])
        if 0 < kept < group:
            return Granularity("n:m", kept=kept, group=group)
        raise ConfigError(f"'{text}' must keep fewer than it groups, and at least one, e.g. 2:4")
    if match := re.fullmatch(r"block:(\d+)x(\d+)", text):
        rows, cols = int(match[1]), int(match[2])
        if rows and cols:
            return Granularity("block", rows=rows, cols=cols)
    named = ("weight", *STRUCTURAL)
    raise ConfigError(
        f"unknown granularity '{text}'; known: {', '.join(named)}, N:M (e.g. 2:4), block:ROWSxCOLS (e.g. block:4x4)"
    )
