"""The section "In the wild" of a model card: between two marks, so that it can be replaced."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfprune.checkpoint.files import write_text
from hfprune.errors import CheckpointError
from hfprune.hub.card import CARD_FILE, card_of
from hfprune.report.tables import Rows, as_markdown
from hfprune.wild.report_tables import MOST_RANKED, heading, notes, ranked_rows, slice_rows, totals_rows, worst_of

BEGIN, END = "<!-- hfprune: in the wild -->", "<!-- hfprune: end of in the wild -->"
_BEFORE = "\n## Limits\n"


def write_section(folder: str | os.PathLike, data: Mapping[str, Any], folders: Mapping[str, str]) -> Path:
    """Puts the section into a folder's README.md, or replaces the one that is there; a card is made where none is.

    Args:
        folder: a model's; where it is one of the run's pruned ones, the section is about it and the dense one, else
            about all of them.
        data: as `WildReport` has it.
        folders: the run's models to their folders.

    Raises:
        CheckpointError: see `read_card`; or the card can't be written.
    """
    path = Path(folder) / CARD_FILE
    text = with_section(read_card(folder), section(data, _model_of(Path(folder), folders, data)))
    try:
        write_text(path, text)
    except OSError as error:
        raise CheckpointError(f"--card: can't write '{path}': {error.strerror}") from error
    return path


def read_card(folder: str | os.PathLike) -> str:
    """The card of a model's folder as it stands, or the one that the folder would get.

    Raises:
        CheckpointError: the folder or what it holds is no model's, the card can't be read, or it has only one mark.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"--card: '{folder}' is no folder of a model")
    path = folder / CARD_FILE
    try:
        text = path.read_bytes().decode() if path.is_file() else card_of(folder)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"--card: '{path}' can't be read: {error}") from error
    with_section(text, "")
    return text


def with_section(card: str, text: str) -> str:
    """A card with the section in the place of the earlier one, else before its limits, else at its end.

    Raises:
        CheckpointError: one of the marks is there without the other.
    """
    before, begun, rest = card.partition(BEGIN)
    _, ended, after = (rest if begun else card).partition(END)
    if bool(begun) != bool(ended):
        raise CheckpointError(f"--card: the card holds only one of the marks '{BEGIN}' and '{END}': take it out")
    if begun:
        return f"{before}{text}{after}"
    before, limits, after = card.rpartition(_BEFORE)
    return f"{before.rstrip()}\n\n{text}\n{limits}{after}" if limits else f"{card.rstrip()}\n\n{text}\n"


def section(data: Mapping[str, Any], model: str | None = None) -> str:
    """The section with its marks: the totals, where pruning hurts most, and the slices by dimension; no transcripts.

    Args:
        data: as `WildReport` has it.
        model: the pruned model that the card is of; all of them without.
    """
    parts = [f"## In the wild\n\n{_plain(heading(data))}. {_METHOD}", *(_plain(note) for note in notes(data))]
    parts.append(_table(totals_rows(data, model=model)))
    if suspects := len(data["suspects"]):
        parts.append(
            f"{suspects:,} of the references are suspect: the models agree with each other, and not with them. Without "
            "these items:"
        )
        parts.append(_table(totals_rows(data, "without_suspects", model)))
    for name, rows in worst_of(data, MOST_RANKED):
        if model in (None, name):
            parts += [f"### Where pruning hurts {_plain(name)} most", _table(ranked_rows(rows))]
    for dimension in data["dimensions"]:
        parts += [f"### By {_plain(dimension)}", _table(slice_rows(data, dimension, model))]
    return "\n\n".join([BEGIN, *parts, END])


_METHOD = (
    "Word error rates against human-made transcripts, both sides normalised. Mean, median and deviation are over "
    "items, with 95 % bootstrap intervals; pooled is all errors by all words. An increase is pruned minus dense on the "
    "same items, in percentage points."
)


def _model_of(folder: Path, folders: Mapping[str, str], data: Mapping[str, Any]) -> str | None:
    """The pruned model of the run that lies in a folder; None where none does."""
    place = folder.resolve()
    pruned = [model for model in data["models"] if model != data["dense"]]
    return next((model for model in pruned if folders.get(model) and Path(folders[model]).resolve() == place), None)


def _table(rows: Rows) -> str:
    cells = [tuple(_plain(cell) for cell in row) for row in rows.rows]
    return as_markdown(Rows(tuple(_plain(column) for column in rows.columns), cells))


def _plain(text: str) -> str:
    """A text that Markdown shows as it is: no HTML, no links, no marks."""
    return re.sub(r"([\\`*_\[\]#~])", r"\\\1", html.escape(text, quote=False))
