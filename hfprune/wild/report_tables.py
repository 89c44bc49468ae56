"""A report in the wild as tables: rows are made once, and shown in the terminal, in the card or as CSV."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.markup import escape

from hfprune.profiling import human_bytes
from hfprune.report.tables import UNKNOWN, Rows, as_table

MOST_RANKED = 5
MOST_LISTED = 5
ALL, WITHOUT = "all items", "without suspect references"
CSV_COLUMNS = (
    *("dimension", "slice", "model", "count", "failures", "missing", "mean", "median", "sd", "low", "high", "pooled"),
    *("paired", "increase", "increase_median", "increase_sd", "increase_low", "increase_high"),
)


def share(value: float | None) -> str:
    """An error rate in percent with one decimal; a dash for None."""
    return UNKNOWN if value is None else f"{100 * value:.1f} %"


def points(value: float | None) -> str:
    """A difference of error rates in percentage points, with its sign."""
    return UNKNOWN if value is None else f"{100 * value + 0.0:+.1f}"


def span(interval: list[float] | None, signed: bool = False) -> str:
    """An interval of error rates in percent, or of differences in points; empty where there is none."""
    if interval is None:
        return ""
    low, high = (f"{100 * value + 0.0:{'+' if signed else ''}.1f}" for value in interval)
    return f"{low} to {high}"


def with_span(value: float | None, interval: list[float] | None, signed: bool = False) -> str:
    """A mean and its interval, as in '12.3 % (11.8 to 12.9)'."""
    shown = points(value) if signed else share(value)
    return f"{shown} ({span(interval, signed)})" if interval is not None else shown


def totals_rows(data: Mapping[str, Any], which: str = "all", model: str | None = None) -> Rows:
    """A row a model over all items, or, with `which="without_suspects"`, those whose references are not in doubt."""
    columns = (
        "model",
        "items",
        "failed",
        "WER, mean",
        "median",
        "pooled",
        "CER, mean",
        "increase, points",
        "× real time",
    )
    rows = [
        (
            entry["model"],
            f"{entry['count']:,}",
            f"{entry['failures']:,}",
            with_span(entry["mean"], entry["interval"]),
            share(entry["median"]),
            share(entry["pooled"]),
            share(entry["means"]["cer"]),
            risen(entry),
            UNKNOWN if entry["real_time_factor"] is None else f"{entry['real_time_factor']:.3g}",
        )
        for entry in data["totals"][which] or ()
        if model in (None, entry["model"]) or entry["model"] == data["dense"]
    ]
    return Rows(columns, rows)


def risen(entry: Mapping[str, Any]) -> str:
    """A model's increase over the dense one with its interval, or that it is the dense one."""
    paired = entry["paired"]
    return "dense" if paired is None else with_span(paired["mean"], paired["interval"], signed=True)


def worst_of(data: Mapping[str, Any], most: int) -> list[tuple[str, list[dict[str, Any]]]]:
    """Each pruned model with the slices where pruning hurts it most, none of which it does not hurt: in one list the
    harshest model would stand for all of them."""
    rows = [row for row in data["ranked"] if row["mean"] > 0]
    found = [(model, [row for row in rows if row["model"] == model][:most]) for model in data["models"][1:]]
    return [(model, rows) for model, rows in found if rows]


def ranked_rows(rows: Sequence[Mapping[str, Any]]) -> Rows:
    """Slices where pruning hurts, as `worst_of` gives them."""
    cells = [
        (
            f"{row['dimension']}: {row['slice']}",
            f"{row['count']:,}",
            share(row["dense"]),
            share(row["pruned"]),
            with_span(row["mean"], row["interval"], signed=True),
            "too few items" if row["few"] else "above 0" if row["certain"] else "may be chance",
        )
        for row in rows
    ]
    return Rows(("slice", "items", "dense WER", "pruned WER", "increase, points", "interval"), cells)


def slice_rows(data: Mapping[str, Any], dimension: str, model: str | None = None) -> Rows:
    """A dimension's slices, of all models or of the dense and one pruned one."""
    rows = [
        (
            part["name"],
            entry["model"],
            f"{entry['count']:,}",
            f"{entry['failures']:,}",
            with_span(entry["mean"], entry["interval"]),
            share(entry["median"]),
            share(entry["sd"]),
            share(entry["pooled"]),
            risen(entry),
        )
        for part in data["dimensions"][dimension]
        for entry in part["models"]
        if model in (None, entry["model"]) or entry["model"] == data["dense"]
    ]
    words = ("model", "items", "failed", "WER, mean", "median", "deviation", "pooled", "increase, points")
    return Rows((dimension, *words), rows)


def csv_rows(data: Mapping[str, Any]) -> Iterator[list[Any]]:
    """A row a slice and model, under `CSV_COLUMNS`; what is not known is empty."""
    for words, totals in ((ALL, data["totals"]["all"]), (WITHOUT, data["totals"]["without_suspects"])):
        for entry in totals or ():
            yield _csv_row("all", words, entry)
    for dimension, parts in data["dimensions"].items():
        for part in parts:
            for entry in part["models"]:
                yield _csv_row(dimension, part["name"], entry)


def _csv_row(dimension: str, name: str, entry: Mapping[str, Any]) -> list[Any]:
    paired = entry["paired"] or dict.fromkeys(("count", "mean", "median", "sd", "interval"))
    return [
        *(_inert(text) for text in (dimension, name, entry["model"])),
        *(entry[key] for key in ("count", "failures", "missing", "mean", "median", "sd")),
        *(entry["interval"] or (None, None)),
        entry["pooled"],
        *(paired[key] for key in ("count", "mean", "median", "sd")),
        *(paired["interval"] or (None, None)),
    ]


def _inert(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def console_parts(data: Mapping[str, Any]) -> list[Any]:
    """Tables and lines for the terminal."""
    parts: list[Any] = [escape(heading(data)), as_table(_escaped(totals_rows(data)))]
    if data["totals"]["without_suspects"]:
        parts += [WITHOUT, as_table(_escaped(totals_rows(data, "without_suspects")))]
    for model, rows in worst_of(data, MOST_RANKED):
        parts += [escape(f"{model}, beside {data['dense']}"), as_table(_escaped(ranked_rows(rows)))]
    return parts + [escape(line) for line in [*notes(data), *_suspect_lines(data), *_failure_lines(data)]]


def heading(data: Mapping[str, Any]) -> str:
    """What was run, in one line."""
    plans = f" of {', '.join(data['plans'])}" if data["plans"] else ""
    failed = f", {data['items_failed']:,} failed before any model" if data["items_failed"] else ""
    models = len(data["models"])
    return f"{data['items']:,} items{plans}{failed}; {models} model{'' if models == 1 else 's'}"


def notes(data: Mapping[str, Any]) -> list[str]:
    """What a reader must know of this run."""
    lines = []
    if not data["models"]:
        lines.append("no model was run: every item failed before")
    elif len(data["models"]) == 1:
        lines.append("one model only: there is nothing to compare it with, and no suspect reference can be found")
    else:
        if data["ranked"] and not worst_of(data, 1):
            lines.append("no slice has a higher word error rate after pruning")
        if len(data["witnesses"]) < 2:
            lines.append(
                "no suspect reference can be found: fewer than two models hear well enough, with a median word error "
                f"rate of at most {share(data['thresholds']['witness'])}"
            )
    missing = {entry["model"]: entry["missing"] for entry in data["totals"]["all"] if entry["missing"]}
    if missing:
        each = ", ".join(f"{model} {count:,}" for model, count in missing.items())
        lines.append(f"the run has not ended: items that are still to be run: {each}")
    return lines


def _suspect_lines(data: Mapping[str, Any]) -> list[str]:
    found = data["suspects"]
    lines = [f"suspect references, left in unless said otherwise: {len(found):,}"] if found else []
    lines += [f"* {row['title']}: {'; '.join(row['guesses'])}" for row in found[:MOST_LISTED]]
    return lines + ([f"* {len(found) - MOST_LISTED:,} more in the page"] if len(found) > MOST_LISTED else [])


def _failure_lines(data: Mapping[str, Any]) -> list[str]:
    found = data["failures"]
    lines = [
        f"failed: {row['count']:,} × {row['model'] or 'before any model'}: {row['reason']}"
        for row in found[:MOST_LISTED]
    ]
    return lines + (
        [f"failed: {len(found) - MOST_LISTED:,} more reasons in the page"] if len(found) > MOST_LISTED else []
    )


def _escaped(rows: Rows) -> Rows:
    """Cells that may hold anything, so that none is taken for markup."""
    return Rows(rows.columns, [tuple(escape(cell) for cell in row) for row in rows.rows])


def memory(value: float | None) -> str:
    """Bytes as words; a dash for None."""
    return UNKNOWN if value is None else human_bytes(int(value))
