"""A database of a run in the wild, from what models are to have heard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfprune.speech.measures import measure_texts
from hfprune.wild.store import DATABASE, Store


def write_run(folder: Path, items: list[Mapping[str, Any]], plan: str = "trial") -> Path:
    """Writes items with `key`, `reference` and `heard` (model to its transcript, None where it failed), and any other
    column of the table; an item without `heard` is one that failed before any model, for the `reason` it gives."""
    folder.mkdir(parents=True, exist_ok=True)
    with Store(folder / DATABASE) as store:
        number = store.add_plan(plan, "folder", {}, created="2026-01-01T00:00:00+00:00")
        for values in items:
            columns = {name: value for name, value in values.items() if name not in ("heard", "key")}
            columns.setdefault("status", "ok" if "heard" in values else "failed")
            item = store.add_item(number, values["key"], **columns)
            for model, text in values.get("heard", {}).items():
                store.add_result(item, model, folder=f"runs/{model}", **_measured(values["reference"], text))
    return folder / DATABASE


def _measured(reference: str, text: str | None) -> dict[str, Any]:
    if text is None:
        return {"status": "failed", "reason": "out of memory"}
    measures = measure_texts([reference], [text]).to_dict()
    del measures["characters"]
    texts = {"hypothesis": text, "reference_normalised": reference, "hypothesis_normalised": text}
    return {"status": "ok", "seconds": 1.0, "real_time_factor": 0.5, "peak_memory": 1000, **texts, **measures}


def ten_words(wrong: int) -> str:
    """Ten words, of which so many differ from `ten_words(0)`."""
    return " ".join(["x"] * wrong + list("abcdefghij")[wrong:])
