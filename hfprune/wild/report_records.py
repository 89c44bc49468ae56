"""What a report is made of: a run's items and measures, read from its database as something that anyone may have made.

Texts that are long are cut, control characters go, and numbers that are none count as not measured. Nothing is written.
"""

from __future__ import annotations

import json
import sqlite3
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfprune.errors import DataError
from hfprune.wild.store import COLUMNS, DATABASE

MOST_CHARACTERS = 100_000
"""Of a transcript; what comes after them is not read."""
_MOST_NUMBER = 1e15  # nothing that is measured here is as large, and sums stay finite
MOST_LABEL = 80
"""Characters of a title, a category and their like."""
_TURNING = {chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F)}
"""Characters that turn the direction of all that follows."""

MEASURES = ("wer", "mer", "wil", "wip", "cer")
_COUNTS = ("hits", "substitutions", "deletions", "insertions")
_NUMBERS = (*MEASURES, *_COUNTS, "words", "seconds", "real_time_factor", "peak_memory")


@dataclass(frozen=True)
class Item:
    """A recording, as the table `item` has it; what is not known is missing.

    Attributes:
        labels: `category`, `language`, `region` and `plan`.
        numbers: `duration` in seconds, `speaking_rate` in words a minute, `loudness` in dBFS.
        conditions: name to value, as words.
        failed: whether nothing came of it before any model heard it; `reason` says why.
    """

    number: int
    title: str
    url: str | None
    labels: dict[str, str]
    numbers: dict[str, float]
    conditions: dict[str, str]
    failed: bool
    reason: str


@dataclass(frozen=True)
class Result:
    """What a model made of an item; `measures` is empty where it failed, and `reason` says why."""

    measures: dict[str, float]
    reason: str = ""

    @property
    def wer(self) -> float | None:
        """The word error rate; None where it failed."""
        return self.measures.get("wer")

    @property
    def errors(self) -> float | None:
        """Words that are wrong, left out or too many; None where they were not counted."""
        counts = [self.measures.get(name) for name in _COUNTS[1:]]
        return None if None in counts else sum(counts)


@dataclass(frozen=True)
class Texts:
    """The transcripts of an item: `reference` as it was, the others normalised, `hypotheses` by model."""

    reference: str
    normalised: str
    hypotheses: dict[str, str]


@dataclass(frozen=True)
class Records:
    """A run: `models` with the dense one first, the items, and the results by item and model."""

    path: Path
    models: tuple[str, ...]
    folders: dict[str, str]
    plans: tuple[str, ...]
    items: tuple[Item, ...]
    results: dict[tuple[int, str], Result] = field(repr=False)

    @property
    def dense(self) -> str | None:
        """The model that the others are compared with; None where no model has run."""
        return self.models[0] if self.models else None

    def wer(self, item: Item, model: str) -> float | None:
        """The word error rate of a model on an item; None where there is none."""
        result = self.results.get((item.number, model))
        return None if result is None else result.wer

    def texts(self, item: Item) -> Texts:
        """The transcripts of an item, read anew: those of all items together may be large."""
        asked = "SELECT model, {} FROM result WHERE item_id = ? ORDER BY id".format(
            ", ".join(f"substr({name}, 1, {MOST_CHARACTERS})" for name in _NORMALISED)
        )
        with _reading(self.path) as database:
            one = f"SELECT substr(reference, 1, {MOST_CHARACTERS}) FROM item WHERE id = ?"
            (reference,) = database.execute(one, (item.number,)).fetchone()
            rows = database.execute(asked, (item.number,)).fetchall()
        wanted = {_name(model): (plain(said), plain(heard)) for model, said, heard in rows}
        known = {
            model: wanted[model] for model in self.models if self.results.get((item.number, model), _NONE).measures
        }
        normalised = next((said for said, _ in known.values() if said), "")
        return Texts(plain(reference), normalised, {model: heard for model, (_, heard) in known.items()})


_NORMALISED = ("reference_normalised", "hypothesis_normalised")
_NONE = Result({})


def read_records(place: str | Path) -> Records:
    """Reads a run.

    Args:
        place: the database, or the folder in which it lies as `wild.sqlite`.

    Raises:
        DataError: it is missing, is no database of a wild run, or holds no item.
    """
    path = Path(place)
    path = path / DATABASE if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"'{path}' does not exist: `hfprune wild run` makes it")
    with _reading(path) as database:
        _check_columns(database, path)
        plans = {row["id"]: label(row["name"]) for row in database.execute("SELECT id, name FROM plan ORDER BY id")}
        items = tuple(_item(row, plans) for row in database.execute(_all_but_texts("item")))
        rows = database.execute(_all_but_texts("result")).fetchall()
    if not items:
        raise DataError(f"'{path}' holds no items: run a plan first, `hfprune wild run PLAN --models …`")
    if not rows and not any(item.failed for item in items):
        raise DataError(f"'{path}': none of its {len(items):,} items has been run: `hfprune wild run` does that")
    folders = {_name(row["model"]): plain(row["folder"]) for row in rows}
    results = {(row["item_id"], _name(row["model"])): _result(row) for row in rows}
    return Records(path, tuple(folders), folders, tuple(plans.values()), items, results)


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    """The database, opened only to be read; whatever is wrong with it is one line."""
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            database.row_factory = sqlite3.Row
            database.text_factory = lambda raw: raw.decode("utf-8", "replace")
            yield database
    except sqlite3.Error as error:
        raise DataError(f"'{path}' can't be read as a database of a wild run: {error}") from error


def _check_columns(database: sqlite3.Connection, path: Path) -> None:
    for table, columns in COLUMNS.items():
        present = {row["name"] for row in database.execute(f"PRAGMA table_info({table})")}
        if lacking := [name for name in columns if name not in present]:
            what = f"its table '{table}' has no column '{lacking[0]}'" if present else f"it has no table '{table}'"
            raise DataError(f"'{path}' is no database of a wild run: {what}")


def _all_but_texts(table: str) -> str:
    """A query of all rows in the order in which they were first written, without what may be long."""
    long = ("reference", "hypothesis", *_NORMALISED)
    names = [f"substr({name}, 1, 4000) AS {name}" if kind == "TEXT" else name
             for name, kind in COLUMNS[table].items() if name not in long]  # fmt: skip
    return f"SELECT {', '.join(names)} FROM {table} ORDER BY id"


def _item(row: Mapping[str, Any], plans: Mapping[int, str]) -> Item:
    labels = {name: label(row[name]) for name in ("category", "language", "region")}
    labels["plan"] = plans.get(row["plan_id"], "")
    numbers = {name: _number(row[name]) for name in ("duration", "speaking_rate", "loudness")}
    return Item(
        number=row["id"],
        title=label(row["title"]) or label(row["key"]) or f"item {row['id']}",
        url=_safe_url(plain(row["url"])),
        labels={name: value for name, value in labels.items() if value},
        numbers={name: value for name, value in numbers.items() if value is not None},
        conditions=_conditions(row["conditions"]),
        failed=row["status"] == "failed",
        reason=plain(row["reason"], 300),
    )


def _result(row: Mapping[str, Any]) -> Result:
    known = {name: _number(row[name]) for name in _NUMBERS}
    measures = {name: value for name, value in known.items() if value is not None and value >= 0}
    if row["status"] == "ok" and "wer" in measures:
        return Result(measures)
    return Result({}, plain(row["reason"], 300) or ("no reason given" if row["status"] == "failed" else "no measures"))


def _conditions(text: Any) -> dict[str, str]:
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return {}
    pairs = found.items() if isinstance(found, dict) else ()
    return {label(name): label(value) for name, value in pairs if label(name) and label(value)}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and abs(value) < _MOST_NUMBER else None


def _name(model: Any) -> str:
    """A model's name: not cut as other names are, so that two of the same folder stay two."""
    return plain(model, 300) or "unnamed"


def _safe_url(url: str) -> str | None:
    """Only what a page may link to: nothing that a browser would run."""
    return url if url.lower().startswith(("https://", "http://")) and len(url) <= 500 else None


def plain(value: Any, most: int = MOST_CHARACTERS) -> str:
    """A text in one line without control characters, cut where it is long; empty for None.

    Joiners stay, which Persian and Indic scripts need; what turns the direction of a whole line goes.
    """
    text = "" if value is None else str(value)[: 2 * most]
    kept = "".join(" " if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in text if c not in _TURNING)
    words = " ".join(kept.split())
    return words if len(words) <= most else f"{words[: most - 1]}…"


def label(value: Any) -> str:
    """A name in a table."""
    return plain(value, MOST_LABEL)
