"""The report as tables: each kind of row is made once, and shown in the terminal (rich) or in the card (Markdown)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.table import Table

from hfprune.profiling import human_bytes, human_count, human_ms

FRACTIONS = {"accuracy", "acc", "f1", "precision", "recall", "auc", "exact", "iou", "wer", "cer", "top1", "top5"}
BOOKKEEPING = {"runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time"}
UNKNOWN = "–"
GONE = {"ratio": "pruned", "params": "parameters removed", "macs": "MACs removed", "latency": "time saved"}
"""What a step's target and achieved are fractions of, by its `measured`."""


class Rows(NamedTuple):
    """A table before it is drawn: `columns` are headings, every row has as many cells; the first column is words."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def metrics(values: Mapping[str, Any] | None) -> dict[str, float]:
    """The finite numbers among metrics, without the Trainer's `eval_` and its bookkeeping."""
    named = {name.removeprefix("eval_"): value for name, value in (values or {}).items()}
    return {
        name: value
        for name, value in named.items()
        if name not in BOOKKEEPING and isinstance(value, int | float) and math.isfinite(value)
    }


def main_metric(report: Mapping[str, Any]) -> str:
    """The name of the metric that the run watched, as `metrics` gives it."""
    return str(report.get("main_metric") or "loss").removeprefix("eval_")


def title(name: str) -> str:
    """A metric's name as words."""
    return name.replace("_", " ")


def is_fraction(name: str, values: Iterable[float | None]) -> bool:
    """Whether a metric is shown in percent: an accuracy or its like, all values within 0 and 1."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    return bool(words & FRACTIONS) and all(0 <= v <= 1 for v in values if v is not None)


def percent(value: float | None) -> str:
    """A fraction as percent with two decimals; a dash for None."""
    return UNKNOWN if value is None else f"{100 * value:.2f} %"


def comparison_rows(report: Mapping[str, Any]) -> Rows:
    """Dense against pruned: metrics, parameters, bytes, MACs, latency, memory; what was not measured has no row."""
    dense, pruned = report.get("dense") or {}, report.get("pruned") or {}
    rows: list[tuple[str, ...]] = []
    before, after = metrics(dense.get("metric")), metrics(pruned.get("metric"))
    for name in sorted(after | before, key=lambda name: (name != main_metric(report), name)):
        old, new = before.get(name), after.get(name)
        change = _points(old, new) if is_fraction(name, (old, new)) else _ratio(old, new)
        rows.append((title(name), _metric(name, old, new), _metric(name, new, old), change))
    sizes = (
        ("parameters", "params", lambda n: f"{n:,}"),
        ("non-zero parameters", "nonzero", lambda n: f"{n:,}"),
        ("checkpoint tensors", "bytes", human_bytes),
        ("MACs, one example", "macs", human_count),
    )
    for label, key, show in sizes:
        rows += _row(label, dense.get(key), pruned.get(key), show)
    for label, key, show in (("latency", "latency_ms", human_ms), ("peak memory", "memory_bytes", human_bytes)):
        old, new = dense.get(key) or {}, pruned.get(key) or {}
        for batch in sorted({*old, *new}, key=int):
            rows += _row(f"{label}, batch {batch}", old.get(batch), new.get(batch), show)
    return Rows(("", "dense", "pruned", "change"), rows)


def steps_rows(report: Mapping[str, Any]) -> Rows:
    """One row a step: target, reached, the main metric right after pruning and after fine-tuning, epochs, seconds; of a
    strategy also the block, and the learning rate where it fine-tuned."""
    name = main_metric(report)
    steps = report.get("steps") or []
    values = [(metrics(s.get("metric_before")).get(name), metrics(s.get("metric")).get(name)) for s in steps]
    share = is_fraction(name, [v for pair in values for v in pair])

    def show(value: float | None) -> str:
        return percent(value) if share else _number(value)

    by_block = any(step.get("block") for step in steps)
    blocks = short_paths([step.get("block", "") for step in steps])
    rows = [
        (
            f"{number} {block}".strip(),
            percent(step.get("target")),
            percent(step.get("achieved")),
            show(before),
            UNKNOWN if step.get("fine_tuned") is False else show(after),
            *([_number(step.get("learning_rate"))] if by_block else []),
            UNKNOWN if step.get("epochs") is None else f"{step['epochs']:g}",
            UNKNOWN if step.get("seconds") is None else f"{step['seconds']:.1f}",
        )
        for number, (step, block, (before, after)) in enumerate(zip(steps, blocks, values, strict=True), start=1)
    ]
    words = title(name)
    measured = next((step.get("measured", "ratio") for step in steps), "ratio")
    target = "target" if measured == "ratio" else f"target, {GONE[measured]}"
    columns = ("step", target, "reached", f"{words}, pruned", f"{words}, fine-tuned")
    return Rows((*columns, *(["learning rate"] if by_block else []), "epochs", "seconds"), rows)


def short_paths(paths: Sequence[str]) -> list[str]:
    """Module paths without the parts that all begin with; two parts stay, such as `layer.3`."""
    parts = [path.split(".") for path in paths]
    common = 0
    while parts and all(len(p) > common + 2 and p[common] == parts[0][common] for p in parts):
        common += 1
    return [".".join(p[common:]) for p in parts]


def strategy_sentence(report: Mapping[str, Any]) -> str | None:
    """What a strategy did, in a sentence; None where there was none."""
    known = report.get("strategy")
    if not known:
        return None
    parts = [f"{known['kind'].upper()}: {known['fine_tuned']} of {known['steps']} steps were fine-tuned"]
    if known.get("frozen"):
        layers = f"{len(known['frozen'])} of {len(known['changes'])} layers were frozen"
        parts.append(f"{layers} (found in {known['probe_seconds']:.1f} s)")
    if known.get("trials"):
        parts.append(
            f"the settings were searched for in {known['tuning_seconds']:.1f} s ({len(known['trials'])} trials)"
        )
    return "; ".join(parts) + "."


def sparsity_rows(report: Mapping[str, Any], most: int = 20) -> Rows:
    """One row a tensor in the model's order, at most `most` of them (the largest), then the rest and the whole."""
    entries = report.get("sparsity") or {}
    largest = set(sorted(entries, key=lambda name: -entries[name]["numel"])[:most])
    rows = [_sparsity_row(name, [entry], entry["pattern"]) for name, entry in entries.items() if name in largest]
    rest = [entry for name, entry in entries.items() if name not in largest]
    if rest:
        rows.append(_sparsity_row(f"{len(rest)} smaller", rest, ""))
    if len(entries) > 1:
        rows.append(_sparsity_row("all of these", list(entries.values()), ""))
    return Rows(("tensor", "zeros", "values", "sparsity", "pattern"), rows)


def removed_rows(report: Mapping[str, Any], most: int = 20) -> Rows:
    """One row a coupled group in the model's order, at most `most` of them (those that lost most), then the rest and
    the whole; no rows where nothing was removed."""
    removed = report.get("removed") or {}
    groups = removed.get("groups") or {}
    shown = set(sorted(groups, key=lambda name: groups[name]["kept"] - groups[name]["units"])[:most])
    rows = [_group_row(name, [group], group["kind"]) for name, group in groups.items() if name in shown]
    rest = [group for name, group in groups.items() if name not in shown]
    if rest:
        rows.append(_group_row(f"{len(rest)} more", rest, ""))
    if len(groups) > 1:
        rows.append(_group_row("all of these", list(groups.values()), ""))
    if removed.get("blocks"):
        gone = len(removed["dropped"])
        rows.append(
            _group_row("residual blocks", [{"units": removed["blocks"], "kept": removed["blocks"] - gone}], "layer")
        )
    return Rows(("group", "kind", "units", "kept", "removed"), rows)


def sizes_rows(report: Mapping[str, Any]) -> Rows:
    """One row a member of an exported family, the dense model first: size, parameters, bytes, MACs, the main metric,
    latency and how much faster than the dense model, and where it lies; no rows where nothing was exported."""
    members = report.get("sizes") or []
    name = main_metric(report)
    values = [metrics(member.get("metric")).get(name) for member in members]
    share = is_fraction(name, values)
    batches = sorted({batch for member in members for batch in member["latency_ms"]}, key=int)
    rows = []
    for member, value in zip(members, values, strict=True):
        shown = percent(value) if share else _number(value)
        row = ["dense" if member["size"] == 1 else f"{member['size']:g}", f"{member['params']:,}"]
        row += [human_bytes(member["bytes"]), UNKNOWN if member["macs"] is None else human_count(member["macs"]), shown]
        for batch in batches:
            now, dense = member["latency_ms"].get(batch), members[0]["latency_ms"].get(batch)
            row.append(f"{human_ms(now)} ({dense / now:.2f}x)" if now and dense else UNKNOWN)
        tag = f", tag {member['tag']}" if "tag" in member else ""
        rows.append((*row, f"{member.get('folder', '')}{tag}"))
    speeds = (f"batch {batch} (faster)" for batch in batches)
    return Rows(("size", "parameters", "tensors", "MACs", title(name), *speeds, "folder"), rows)


def sizes_table(report: Mapping[str, Any]) -> Table:
    """The members of an exported family, for `rich.print`."""
    return as_table(sizes_rows(report))


def removed_table(report: Mapping[str, Any], most: int = 20) -> Table:
    """What was removed, one row a group, for `rich.print`."""
    return as_table(removed_rows(report, most))


def comparison_table(report: Mapping[str, Any]) -> Table:
    """Dense, pruned and change, for `rich.print`; the caption says how it was measured."""
    return as_table(comparison_rows(report), caption="\n".join(conditions(report)) or None)


def steps_table(report: Mapping[str, Any]) -> Table:
    """The trajectory, one row a step, for `rich.print`."""
    return as_table(steps_rows(report))


def sparsity_table(report: Mapping[str, Any], most: int = 20) -> Table:
    """Zeros of every pruned tensor, at most `most` of them by name, for `rich.print`."""
    return as_table(sparsity_rows(report, most))


def conditions(report: Mapping[str, Any]) -> list[str]:
    """Sentences on how what the comparison shows was measured."""
    return [sentence for sentence in (perplexity_conditions(report), latency_conditions(report)) if sentence]


def perplexity_conditions(report: Mapping[str, Any]) -> str | None:
    """One sentence on how perplexity was evaluated; None where it was not, or that is not known."""
    known = report.get("evaluation")
    if not known or not any(
        "perplexity" in metrics((report.get(side) or {}).get("metric")) for side in ("dense", "pruned")
    ):
        return None
    return (
        f"Perplexity: sequences of {known['sequence_length']} tokens, stride {known['stride']}, the first token of "
        f"each not counted, in {known['dtype']}."
    )


def latency_conditions(report: Mapping[str, Any]) -> str | None:
    """One sentence on how latency was measured; None where it was not, or the machine is not known."""
    known = report.get("environment") or {}
    if not any((report.get(side) or {}).get("latency_ms") for side in ("dense", "pruned")):
        return None
    device = known.get("device")
    where = [known.get("machine")] if device in (None, "cpu") else [device]
    threads = known.get("threads")
    where += [f"{threads} thread{'' if threads == 1 else 's'}"] if threads and device in (None, "cpu") else []
    where += [known.get("dtype")]
    conditions = ", ".join(part for part in where if part)
    return f"Latency: median of one forward pass of the whole batch on {conditions}." if conditions else None


def as_table(rows: Rows, caption: str | None = None) -> Table:
    """Rows for the terminal."""
    table = Table(caption=caption, caption_justify="left")
    for index, column in enumerate(rows.columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows.rows:
        table.add_row(*row)
    return table


def as_markdown(rows: Rows) -> str:
    """Rows as a Markdown table; characters that would break a cell are escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"

    rule = "|" + "|".join(":--" if index == 0 else "--:" for index in range(len(rows.columns))) + "|"
    return "\n".join([line(rows.columns), rule, *(line(row) for row in rows.rows)])


def _row(label: str, old: float | None, new: float | None, show: Any) -> list[tuple[str, ...]]:
    """One row, or none where neither side was measured."""
    if old is None and new is None:
        return []
    return [(label, UNKNOWN if old is None else show(old), UNKNOWN if new is None else show(new), _ratio(old, new))]


def _metric(name: str, value: float | None, other: float | None) -> str:
    return percent(value) if is_fraction(name, (value, other)) else _number(value)


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _points(old: float | None, new: float | None) -> str:
    return UNKNOWN if old is None or new is None else f"{100 * (new - old):+.2f} points"


def _ratio(old: float | None, new: float | None) -> str:
    """Such as '0.20x'; the difference where a ratio would say nothing."""
    if old is None or new is None:
        return UNKNOWN
    if old <= 0 or new < 0:
        return "" if old == new else f"{new - old:+.4g}"
    ratio = new / old
    return f"{ratio:.2g}x" if 0 < ratio < 0.095 else f"{ratio:.2f}x"


def _sparsity_row(label: str, entries: Sequence[Mapping[str, Any]], pattern: str) -> tuple[str, ...]:
    zeros, numel = sum(e["zeros"] for e in entries), sum(e["numel"] for e in entries)
    return label, f"{zeros:,}", f"{numel:,}", percent(zeros / numel if numel else None), pattern


def _group_row(label: str, groups: Sequence[Mapping[str, Any]], kind: str) -> tuple[str, ...]:
    before, after = sum(g["units"] for g in groups), sum(g["kept"] for g in groups)
    return label, kind, f"{before:,}", f"{after:,}", percent(1 - after / before if before else None)
