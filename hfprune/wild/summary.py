"""What came of a run, in a table and a few lines."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hfprune.profiling import human_bytes
from hfprune.wild.store import DATABASE, Store


def summary(output: str | Path, plan: int, most: int = 10) -> RenderableType:
    """A row a model: mean word error rate over the items that it heard, how many, failures, speed and memory.

    Args:
        output: the run's folder.
        plan: the number of the plan in its database.
        most: reasons of failures that are shown, the most frequent first.
    """
    with Store(Path(output) / DATABASE, make=False) as store:
        items, results = store.items(plan), store.results(plan)
    durations = {item["id"]: item["duration"] for item in items}
    table = Table("model")
    for name in ("WER, mean", "WER, all words", "items", "failed", "real-time factor", "peak memory"):
        table.add_column(name, justify="right")
    for model in dict.fromkeys(row["model"] for row in results):
        table.add_row(Text(model), *_row([row for row in results if row["model"] == model], durations))
    failed = [item for item in items if item["status"] == "failed"]
    reasons = Counter(item["reason"] for item in failed)
    reasons.update(f"{row['model']}: {row['reason']}" for row in results if row["status"] == "failed")
    lines: list[RenderableType] = [table]
    if failed:
        lines.append(Text(f"{len(failed)} of {len(items)} items could not be tested."))
    lines += [Text(f"  {count} x {reason}") for reason, count in reasons.most_common(most)]
    if len(reasons) > most:
        lines.append(Text(f"  and {len(reasons) - most} more reasons"))
    return Group(*lines)


def _row(rows: list[dict[str, Any]], durations: dict[int, float]) -> list[str]:
    ok = [row for row in rows if row["status"] == "ok"]
    failures = str(len(rows) - len(ok))
    if not ok:
        return ["–", "–", "0", failures, "–", "–"]
    errors = sum(row["substitutions"] + row["deletions"] + row["insertions"] for row in ok)
    speed = sum(row["seconds"] for row in ok) / sum(durations[row["item_id"]] for row in ok)
    peaks = [row["peak_memory"] for row in ok if row["peak_memory"] is not None]
    return [
        f"{fmean(row['wer'] for row in ok):.1%}",
        f"{errors / sum(row['words'] for row in ok):.1%}",
        str(len(ok)),
        failures,
        f"{speed:.3f}",
        human_bytes(max(peaks)) if peaks else "–",
    ]
