"""Aligned transcripts: the reference's words with what the dense and the pruned model made of each, as columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from hfprune.speech.needs import needed
from hfprune.wild.report_records import plain

MOST_COLUMNS = 60
"""Of a long transcript those are shown where the pruned model does worst."""
_MOST_WORDS = 5000
_MOST_LETTERS, _MOST_INSERTED = 40, 160
HIT, SUBSTITUTED, DELETED, INSERTED = "hit", "substituted", "deleted", "inserted"


class Cell(NamedTuple):
    """What a model made of a word: its words, none where it left the word out, and the kind."""

    text: str
    kind: str


class Column(NamedTuple):
    """A word of the reference, or none between two, and what each model made of it; None where there is nothing."""

    reference: str
    cells: tuple[Cell | None, ...]


def align(reference: str, hypotheses: Sequence[str]) -> dict[str, Any]:
    """One alignment for each hypothesis, by jiwer, side by side.

    Args:
        reference, hypotheses: normalised; of each the first 5,000 words are aligned.

    Returns:
        `columns`: at most `MOST_COLUMNS`, those where the last hypothesis is furthest behind the first; `before` and
        `after`: how many columns are left out on either side.
    """
    said = reference.split()[:_MOST_WORDS]
    if not said:
        return {"columns": [], "before": 0, "after": 0}
    parts = [_by_word(said, text.split()[:_MOST_WORDS]) for text in hypotheses]
    columns: list[Column] = []
    for place in range(len(said) + 1):
        extra = tuple(
            Cell(plain(" ".join(added[place]), _MOST_INSERTED), INSERTED) if added[place] else None
            for added, _ in parts
        )
        if any(extra):
            columns.append(Column("", extra))
        if place < len(said):
            columns.append(Column(_cut(said[place]), tuple(cells[place] for _, cells in parts)))
    start = _worst(columns)
    shown = columns[start : start + MOST_COLUMNS]
    return {"columns": shown, "before": start, "after": len(columns) - start - len(shown)}


def _by_word(said: list[str], heard: list[str]) -> tuple[list[list[str]], list[Cell]]:
    """What was inserted before each word and behind the last one, and what became of each word."""
    added: list[list[str]] = [[] for _ in range(len(said) + 1)]
    cells = [Cell("", DELETED)] * len(said)
    for chunk in needed("jiwer").process_words(" ".join(said), " ".join(heard)).alignments[0]:
        words = heard[chunk.hyp_start_idx : chunk.hyp_end_idx]
        if chunk.type == "insert":
            added[chunk.ref_start_idx] += words
        elif chunk.type != "delete":
            kind = HIT if chunk.type == "equal" else SUBSTITUTED
            cells[chunk.ref_start_idx : chunk.ref_end_idx] = [Cell(_cut(word), kind) for word in words]
    return added, cells


def _worst(columns: Sequence[Column]) -> int:
    """Where the columns begin that hold most errors of the last model that the first one does not make."""
    harm = [_errors(column.cells[-1]) - _errors(column.cells[0]) * (len(column.cells) > 1) for column in columns]
    best, start, now = sum(harm[:MOST_COLUMNS]), 0, sum(harm[:MOST_COLUMNS])
    for place in range(1, len(harm) - MOST_COLUMNS + 1):
        now += harm[place + MOST_COLUMNS - 1] - harm[place - 1]
        if now > best:
            best, start = now, place
    return start


def _errors(cell: Cell | None) -> int:
    if cell is None or cell.kind == HIT:
        return 0
    return max(1, len(cell.text.split()))


def _cut(text: str) -> str:
    return plain(text, _MOST_LETTERS)
