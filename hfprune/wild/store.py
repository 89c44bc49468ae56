"""The database of a wild run: plans, their items, and what each model made of each item."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hfprune.errors import CheckpointError, DataError

DATABASE = "wild.sqlite"

COLUMNS = {
    "plan": {"id": "INTEGER PRIMARY KEY", "name": "TEXT", "created": "TEXT", "source": "TEXT", "parameters": "TEXT"},
    "item": {
        "id": "INTEGER PRIMARY KEY",
        "plan_id": "INTEGER",
        "key": "TEXT",
        "title": "TEXT",
        "category": "TEXT",
        "language": "TEXT",
        "region": "TEXT",
        "licence": "TEXT",
        "duration": "REAL",
        "url": "TEXT",
        "reference": "TEXT",
        "reference_language": "TEXT",
        "words": "INTEGER",
        "speaking_rate": "REAL",
        "loudness": "REAL",
        "conditions": "TEXT",
        "status": "TEXT",
        "reason": "TEXT",
    },
    "result": {
        "id": "INTEGER PRIMARY KEY",
        "item_id": "INTEGER",
        "model": "TEXT",
        "folder": "TEXT",
        "status": "TEXT",
        "reason": "TEXT",
        "hypothesis": "TEXT",
        "reference_normalised": "TEXT",
        "hypothesis_normalised": "TEXT",
        **dict.fromkeys(("wer", "mer", "wil", "wip", "cer"), "REAL"),
        **dict.fromkeys(("hits", "substitutions", "deletions", "insertions", "words"), "INTEGER"),
        "seconds": "REAL",
        "real_time_factor": "REAL",
        "peak_memory": "INTEGER",
        "finished": "TEXT",
    },
}
"""Durations in seconds, speaking rates in words a minute, loudness in dBFS, memory in bytes; `parameters` and
`conditions` are JSON. An item's status is planned, ok or failed, a result's ok or failed."""

_UNIQUE = {"plan": "", "item": ", UNIQUE(plan_id, key)", "result": ", UNIQUE(item_id, model)"}
_JSON = ("parameters", "conditions")


class Store:
    """The database `wild.sqlite`, made where it is missing; every change is on disk when its call returns.

    Args:
        path: the file.
        make: whether a missing file is made.

    Raises:
        DataError: it is missing, or no database of a wild run.
    """

    def __init__(self, path: str | Path, make: bool = True) -> None:
        self.path = Path(path)
        if not make and not self.path.is_file():
            raise DataError(f"'{path}' does not exist: `hfprune wild run` makes it")
        try:
            self._connection = sqlite3.connect(self.path)
            self._connection.row_factory = sqlite3.Row
            for table, columns in COLUMNS.items():
                present = {row["name"] for row in self._connection.execute(f"PRAGMA table_info({table})")}
                if present and not set(columns) <= present:
                    raise DataError(f"'{path}' is no database of a wild run: its table '{table}' is another one")
            for table, columns in COLUMNS.items():
                rows = ", ".join(f"{name} {kind}" for name, kind in columns.items())
                self._connection.execute(f"CREATE TABLE IF NOT EXISTS {table} ({rows}{_UNIQUE[table]})")
            self._connection.commit()
        except sqlite3.Error as error:
            raise DataError(f"'{path}' can't be opened as a database: {error}") from error

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    def add_plan(self, name: str, source: str, parameters: Mapping[str, Any], created: str | None = None) -> int:
        """The number of a plan: of the one with this name and moment, or of a new one.

        Args:
            name: how a report calls it.
            source: `youtube`, `folder` or `dataset`.
            parameters: what was asked for.
            created: when it was made, as ISO 8601; by default now.
        """
        created = created or now()
        for row in self._connection.execute("SELECT id FROM plan WHERE name = ? AND created = ?", (name, created)):
            return row["id"]
        values = {"name": name, "created": created, "source": source, "parameters": dict(parameters)}
        return self._write("plan", values)

    def add_item(self, plan: int, key: str, **values: Any) -> int:
        """The number of an item of a plan, by its key; the columns that are named are written anew."""
        return self._write("item", {"plan_id": plan, "key": key, **values}, ("plan_id", "key"))

    def add_result(self, item: int, model: str, **values: Any) -> int:
        """Writes what a model made of an item; what stood there before goes."""
        empty = dict.fromkeys(name for name in COLUMNS["result"] if name != "id")
        return self._write(
            "result", {**empty, "finished": now(), **values, "item_id": item, "model": model}, ("item_id", "model")
        )

    def plans(self) -> list[dict[str, Any]]:
        """All plans, in order."""
        return self._read("SELECT * FROM plan ORDER BY id")

    def items(self, plan: int | None = None) -> list[dict[str, Any]]:
        """The items of a plan, or of all, in order; each has its columns."""
        return self._read("SELECT * FROM item WHERE ?1 IS NULL OR plan_id = ?1 ORDER BY id", (plan,))

    def results(self, plan: int | None = None) -> list[dict[str, Any]]:
        """What models made of the items of a plan, or of all, in the order in which it was first written."""
        asked = "SELECT result.* FROM result JOIN item ON item.id = result.item_id"
        return self._read(f"{asked} WHERE ?1 IS NULL OR item.plan_id = ?1 ORDER BY result.id", (plan,))

    def _read(self, asked: str, values: Iterable[Any] = ()) -> list[dict[str, Any]]:
        with closing(self._connection.execute(asked, tuple(values))) as rows:
            return [{name: _read_value(name, row[name]) for name in row.keys()} for row in rows]  # noqa: SIM118

    def _write(self, table: str, values: Mapping[str, Any], unique: tuple[str, ...] = ()) -> int:
        unknown = set(values) - set(COLUMNS[table])
        if unknown:
            raise DataError(f"the table '{table}' has no column '{sorted(unknown)[0]}'")
        stored = [
            json.dumps(value, ensure_ascii=False) if name in _JSON and value is not None else value
            for name, value in values.items()
        ]
        names = ", ".join(values)
        asked = f"INSERT INTO {table} ({names}) VALUES ({', '.join('?' * len(stored))})"
        if unique:
            mended = ", ".join(f"{name} = excluded.{name}" for name in values)
            asked += f" ON CONFLICT ({', '.join(unique)}) DO UPDATE SET {mended}"
        try:
            with self._connection:
                (number,) = self._connection.execute(f"{asked} RETURNING id", stored).fetchone()
        except sqlite3.Error as error:
            raise CheckpointError(f"'{self.path}' can't be written: {error}; what was there stays") from error
        return number


def _read_value(name: str, value: Any) -> Any:
    return json.loads(value) if name in _JSON and value is not None else value


def now() -> str:
    """This moment, as ISO 8601 in UTC."""
    return moment(datetime.now(UTC).timestamp())


def moment(seconds: float) -> str:
    """A moment, in seconds since 1970, as ISO 8601 in UTC; two of them compare as texts."""
    return datetime.fromtimestamp(int(seconds), UTC).isoformat()
