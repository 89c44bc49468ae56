"""Slices of a run: how the models do by category, language, duration and so on, and where pruning hurts most."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import bootstrap

from hfprune.wild.report_records import Item, Records

LEVEL = 0.95
FEW = 5
"""A slice with fewer paired items than this is marked, and stands below the others."""
MOST_SLICES = 40
"""Slices of one dimension; what is rarer stands together."""
UNKNOWN = "not stated"
_AT_ONCE = 4_000_000
"""Values that are drawn at once; more are drawn in parts."""


class Bins(NamedTuple):
    """How a number becomes a slice: `names` has one more than `edges`; a value on an edge belongs above it."""

    edges: tuple[float, ...]
    names: tuple[str, ...]

    def of(self, value: float) -> str:
        """The name of the slice in which a value lies."""
        return self.names[int(np.searchsorted(self.edges, value, side="right"))]


BINS = {
    "duration": Bins(
        (10, 30, 120, 300, 1200),
        ("under 10 s", "10 to 30 s", "30 s to 2 min", "2 to 5 min", "5 to 20 min", "20 min and more"),
    ),
    "speaking_rate": Bins(
        (100, 130, 160, 190),
        ("under 100 (slow)", "100 to 130", "130 to 160", "160 to 190", "190 and more (fast)"),
    ),
    "loudness": Bins(
        (-40, -30, -23, -16),
        ("under -40 (very quiet)", "-40 to -30 (quiet)", "-30 to -23", "-23 to -16", "-16 and more (loud)"),
    ),
}
TITLES = {
    "speaking_rate": "speaking rate, words a minute",
    "loudness": "loudness, dBFS",
}


class Slice(NamedTuple):
    """Items that have something in common."""

    dimension: str
    name: str
    items: tuple[Item, ...]


def slices_of(records: Records) -> dict[str, list[Slice]]:
    """The slices by dimension: labels, numbers in bins, and one dimension for each condition.

    A dimension of which nothing is known is left out; items of which it isn't known stand in a slice of their own. The
    dimension `plan` stands only where there are several.
    """
    found: dict[str, list[Slice]] = {}
    names = ["category", "language", "region", *(["plan"] if len(records.plans) > 1 else [])]
    for name in names:
        found[name] = _by(name, [(item.labels.get(name), item) for item in records.items])
    for name, bins in BINS.items():
        values = [(item.numbers.get(name), item) for item in records.items]
        named = [(None if value is None else bins.of(value), item) for value, item in values]
        found[TITLES.get(name, name)] = _by(TITLES.get(name, name), named, bins.names)
    for name in dict.fromkeys(key for item in records.items for key in item.conditions):
        dimension = name if name not in found else f"condition {name}"
        found[dimension] = _by(dimension, [(item.conditions.get(name), item) for item in records.items])
    return {name: slices for name, slices in found.items() if any(s.name != UNKNOWN for s in slices)}


def _by(dimension: str, named: Iterable[tuple[str | None, Item]], order: Sequence[str] = ()) -> list[Slice]:
    groups: dict[str, list[Item]] = {}
    for name, item in named:
        groups.setdefault(UNKNOWN if name is None else name, []).append(item)
    common = [name for name, _ in Counter({n: len(i) for n, i in groups.items()}).most_common()]
    if len(common) > MOST_SLICES:
        rare = common[MOST_SLICES - 1 :]
        together = [item for name in rare for item in groups.pop(name)]
        groups.setdefault(f"{len(rare)} rarer ones", []).extend(together)
    names = [name for name in order if name in groups] or sorted(groups, key=_natural)
    names += [name for name in groups if name not in names]
    names.sort(key=lambda name: name == UNKNOWN)
    return [Slice(dimension, name, tuple(groups[name])) for name in names]


def _natural(name: str) -> list[tuple[int, float, str]]:
    """Sorts '5 dB' before '10 dB'."""
    parts = re.split(r"(-?\d+(?:\.\d+)?)", name.casefold())
    return [(0, float(part), "") if number % 2 else (1, 0.0, part) for number, part in enumerate(parts) if part]


def summary(records: Records, items: Sequence[Item], model: str, samples: int, seed: int) -> dict[str, Any]:
    """What one model's word error rates are on some items, as plain values.

    Returns:
        `count` of measured items, `failures`, `missing` (not run yet), `mean`, `median`, `sd`, `interval` of the mean
        (percentiles of the bootstrap over items), `pooled` (all errors by all words), and beside a dense model
        `paired`: of the items that both measured, the mean of each, and mean, median, deviation and interval of the
        increase in WER. None where there is too little.
    """
    wers = [wer for item in items if (wer := records.wer(item, model)) is not None]
    failures = sum(_has_failed(records, item, model) for item in items)
    found = {
        "model": model,
        "count": len(wers),
        "failures": failures,
        "missing": len(items) - len(wers) - failures,
        **spread(wers, samples, seed),
        "pooled": pooled(records, items, model),
        "paired": None,
    }
    if model != records.dense:
        both = [(item, increase(records, item, model)) for item in items]
        rises = [(item, rise) for item, rise in both if rise is not None]
        found["paired"] = {
            "count": len(rises),
            "dense": fmean(records.wer(item, records.dense) for item, _ in rises) if rises else None,
            "pruned": fmean(records.wer(item, model) for item, _ in rises) if rises else None,
            **spread([rise for _, rise in rises], samples, seed),
        }
    return found


def _has_failed(records: Records, item: Item, model: str) -> bool:
    result = records.results.get((item.number, model))
    return item.failed if result is None else result.wer is None


def increase(records: Records, item: Item, model: str) -> float | None:
    """By how much a model's WER on an item is above the dense model's; None where one of them is missing."""
    before, after = records.wer(item, records.dense), records.wer(item, model)
    return None if before is None or after is None else after - before


def spread(values: Sequence[float], samples: int, seed: int) -> dict[str, Any]:
    """Mean, median, standard deviation, and the bootstrap interval of the mean; None where there are too few values."""
    if not values:
        return {"mean": None, "median": None, "sd": None, "interval": None}
    several = len(values) > 1
    return {
        "mean": fmean(values),
        "median": median(values),
        "sd": stdev(values) if several else None,
        "interval": interval(values, samples, seed) if several else None,
    }


def interval(values: Sequence[float], samples: int, seed: int) -> list[float]:
    """The percentile bootstrap interval of the mean (Efron 1979) at the level `LEVEL`; the same for the same seed."""
    if min(values) == max(values):
        return [values[0], values[0]]
    found = bootstrap(
        (np.asarray(values, dtype=float),),
        np.mean,
        n_resamples=samples,
        batch=max(1, _AT_ONCE // len(values)),
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return [float(found.low), float(found.high)]


def pooled(records: Records, items: Sequence[Item], model: str) -> float | None:
    """All errors of a model by all words of the references: long items count more than in the mean of items."""
    results = [records.results.get((item.number, model)) for item in items]
    counted = [r for r in results if r is not None and r.errors is not None and r.measures.get("words")]
    words = sum(result.measures["words"] for result in counted)
    return sum(result.errors for result in counted) / words if words else None


def ranked(dimensions: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Where pruning hurts most: a row a slice and pruned model, those first whose interval lies above 0, then by the
    mean increase; slices of fewer than `FEW` paired items come last and are marked.

    A dimension with a single slice says what the totals say, and is left out; so are the items of which it isn't known.

    Args:
        dimensions: dimension to its slices, each with `name` and the `summary` of every model.
    """
    rows = [
        {"dimension": dimension, "slice": part["name"], "model": entry["model"], **entry["paired"],
         "few": entry["paired"]["count"] < FEW}
        for dimension, parts in dimensions.items() if len(parts) > 1
        for part in parts if part["name"] != UNKNOWN
        for entry in part["models"] if (entry["paired"] or {}).get("count")
    ]  # fmt: skip
    for row in rows:
        row["certain"] = not row["few"] and row["interval"] is not None and row["interval"][0] > 0
    return sorted(rows, key=lambda row: (row["few"], not row["certain"], -row["mean"]))
