"""`hfprune wild report`: a run's measures as tables, a page, pictures, plain values, and a section of a model card."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from rich.console import Group as Stack

from hfprune.checkpoint.files import side_folder, write_text
from hfprune.wild.page import render_page
from hfprune.wild.report_alignment import align
from hfprune.wild.report_card import read_card, write_section
from hfprune.wild.report_plots import increase_plot, wer_plot
from hfprune.wild.report_records import MEASURES, Item, Records, read_records
from hfprune.wild.report_slices import FEW, LEVEL, increase, ranked, slices_of, summary
from hfprune.wild.report_suspects import THRESHOLDS, Suspect, suspects, witnesses
from hfprune.wild.report_tables import CSV_COLUMNS, console_parts, csv_rows, worst_of

FORMAT_VERSION = 1
SAMPLES = 2000
PAGE, VALUES, TABLE = "wild_report.html", "wild_report.json", "wild_report.csv"
WER_PICTURE, INCREASE_PICTURE = "wild_wer.png", "wild_increase.png"
MOST_SHOWN = 4
"""Slices of each pruned model whose worst items are shown with their transcripts."""
WORST = 3
"""Items of each of them."""


@dataclass(frozen=True)
class WildReport:
    """What a run in the wild found.

    Attributes:
        data: plain values, as `wild_report.json` holds them: `totals` (with and without suspect references),
            `dimensions` (dimension to slices to models), `ranked` (where pruning hurts most), `worst` (aligned
            transcripts), `suspects`, `failures`.
    """

    data: dict[str, Any]

    @property
    def files(self) -> list[str]:
        """The names of what `save` leaves."""
        return [PAGE, VALUES, TABLE, WER_PICTURE, *([INCREASE_PICTURE] if worst_of(self.data, 1) else [])]

    def table(self) -> Stack:
        """For `rich.print`: the totals, the slices where pruning hurts most, suspects and failures."""
        return Stack(*console_parts(self.data))

    def save(self, folder: str | os.PathLike) -> None:
        """Leaves the page, the pictures, JSON and CSV in a folder, all of them or none.

        Raises:
            CheckpointError: they can't be written.
        """
        with side_folder(folder, replaces=(INCREASE_PICTURE,)) as side:
            write_text(side / PAGE, render_page(self.data))
            write_text(side / VALUES, json.dumps(self.data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
            write_text(side / TABLE, _csv(self.data))
            wer_plot(self.data, side / WER_PICTURE)
            if INCREASE_PICTURE in self.files:
                increase_plot(self.data, side / INCREASE_PICTURE)


def report(
    place: str | os.PathLike,
    output: str | os.PathLike | None = None,
    card: str | os.PathLike | None = None,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
) -> WildReport:
    """Reports on a run in the wild, the dense model (the first one of the run) against every pruned one.

    Example:
        >>> found = hfprune.wild.report("runs/wild", card="runs/whisper_small_60")
        >>> found.data["ranked"][0]["slice"]

    Args:
        place: the database of the run, or the folder in which it lies as `wild.sqlite`.
        output: the folder for `wild_report.html`, `.json`, `.csv` and the pictures; by default the database's.
        card: a model's folder, whose README.md gets the section "In the wild".
        samples: how often the bootstrap draws.
        seed: of the bootstrap.

    Raises:
        DataError: there is no such database, or nothing in it to report on.
        CheckpointError: the files can't be written, or the card's section can't be replaced.
        ConfigError: jiwer is not installed.
    """
    records = read_records(place)
    if card is not None:
        read_card(card)  # what is wrong with it is told before anything is written
    found = WildReport(_data(records, samples, seed))
    found.save(records.path.parent if output is None else output)
    if card is not None:
        write_section(card, found.data, records.folders)
    return found


def summarise(place: str | os.PathLike, *, samples: int = SAMPLES, seed: int = 0) -> WildReport:
    """The same as `report`, and nothing is written.

    Raises:
        DataError, ConfigError: see `report`.
    """
    return WildReport(_data(read_records(place), samples, seed))


def _data(records: Records, samples: int, seed: int) -> dict[str, Any]:
    doubted = suspects(records)
    names = {suspect.item.number for suspect in doubted}
    clean = [item for item in records.items if item.number not in names]
    slices = slices_of(records)
    dimensions = {
        dimension: [
            {
                "name": part.name,
                "items": len(part.items),
                "models": [summary(records, part.items, model, samples, seed) for model in records.models],
            }
            for part in parts
        ]
        for dimension, parts in slices.items()
    }
    rows = ranked(dimensions)
    members = {(part.dimension, part.name): part.items for parts in slices.values() for part in parts}
    data = {
        "format_version": FORMAT_VERSION,
        "plans": list(records.plans),
        "models": list(records.models),
        "dense": records.dense,
        "items": len(records.items),
        "items_failed": sum(item.failed for item in records.items),
        "bootstrap": {"samples": samples, "seed": seed, "level": LEVEL, "few": FEW},
        "totals": {
            "all": _totals(records, records.items, samples, seed),
            "without_suspects": _totals(records, clean, samples, seed) if doubted else None,
        },
        "dimensions": dimensions,
        "ranked": rows,
        "worst": [],
        "suspects": [_suspect_row(records, suspect) for suspect in doubted],
        "witnesses": list(witnesses(records)),
        "thresholds": THRESHOLDS,
        "failures": _failures(records),
    }
    shown = [row for _, part in worst_of(data, MOST_SHOWN) for row in part]
    data["worst"] = _worst(records, shown, members, names)
    return data


def _totals(records: Records, items: Sequence[Item], samples: int, seed: int) -> list[dict[str, Any]]:
    """The summary of every model, with the means of the other measures, median real-time factor and peak memory."""
    rows = []
    for model in records.models:
        results = [records.results.get((item.number, model)) for item in items]
        measures = [result.measures for result in results if result is not None and result.measures]
        known = {name: [m[name] for m in measures if name in m] for name in (*MEASURES, *_COSTS)}
        others = {name: fmean(known[name]) if known[name] else None for name in MEASURES}
        costs = {name: of(known[name]) if known[name] else None for name, of in _COSTS.items()}
        rows.append({**summary(records, items, model, samples, seed), "means": others, **costs})
    return rows


_COSTS = {"real_time_factor": median, "peak_memory": max}


def _worst(
    records: Records,
    rows: Sequence[dict[str, Any]],
    members: dict[tuple[str, str], Sequence[Item]],
    doubted: set[int],
) -> list[dict[str, Any]]:
    """The items of the slices shown on which pruning hurt most, each with its transcripts once; a row gets `worst`, the
    places of its own among them."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for row in rows:
        model = row["model"]
        rises = [(increase(records, item, model), item) for item in members[row["dimension"], row["slice"]]]
        worst = sorted((pair for pair in rises if (pair[0] or 0) > 0), key=lambda pair: (-pair[0], pair[1].number))
        for _, item in worst[:WORST]:
            key = item.number, model
            if key not in found:
                found[key] = {**_worst_row(records, item, model, item.number in doubted), "place": len(found) + 1}
        row["worst"] = [found[item.number, model]["place"] for _, item in worst[:WORST]]
    return list(found.values())


def _worst_row(records: Records, item: Item, model: str, doubted: bool) -> dict[str, Any]:
    texts = records.texts(item)
    aligned = align(texts.normalised, [texts.hypotheses[name] for name in (records.dense, model)])
    wers = {"dense": records.wer(item, records.dense), "pruned": records.wer(item, model)}
    return {**_item_row(item), "model": model, **wers, "suspect": doubted, **aligned}


def _item_row(item: Item) -> dict[str, Any]:
    about = [item.labels[name] for name in ("category", "language", "region") if name in item.labels]
    about += [f"{name}: {value}" for name, value in item.conditions.items()]
    return {"item": item.number, "title": item.title, "url": item.url, "about": about, **item.numbers}


def _suspect_row(records: Records, suspect: Suspect) -> dict[str, Any]:
    return {
        **_item_row(suspect.item),
        "guesses": list(suspect.guesses),
        "least_wer": suspect.least,
        "apart": suspect.apart,
        "wer": {model: records.wer(suspect.item, model) for model in records.models},
        "reference": suspect.reference,
        "heard": suspect.heard,
    }


def _failures(records: Records) -> list[dict[str, Any]]:
    """Reasons by how often they were given, before any model (`model` is None) or by one."""
    counts = Counter((item.reason or "no reason given", None) for item in records.items if item.failed)
    counts.update((r.reason, model) for (_, model), r in records.results.items() if r.wer is None)
    rows = [{"reason": reason, "model": model, "count": count} for (reason, model), count in counts.items()]
    return sorted(rows, key=lambda row: (-row["count"], row["model"] or "", row["reason"]))


def _csv(data: dict[str, Any]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows(csv_rows(data))
    return text.getvalue()
