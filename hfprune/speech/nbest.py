"""n-best lists: what a recogniser holds possible of each utterance, with its scores, as JSON lines."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfprune.errors import DataError
from hfprune.speech.normalise import normaliser


@dataclass(frozen=True)
class Hypothesis:
    """One of a list.

    Attributes:
        text: the words.
        score: the recogniser's log-probability of them, or any number that grows with it.
    """

    text: str
    score: float


@dataclass(frozen=True)
class NBest:
    """The hypotheses of one utterance.

    Attributes:
        reference: what was said.
        hypotheses: at least one; in any order.
        language: a code such as `en`, by which texts are normalised; None where it isn't known.
    """

    reference: str
    hypotheses: tuple[Hypothesis, ...]
    language: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        said = [{"text": one.text, "score": one.score} for one in self.hypotheses]
        return {"reference": self.reference, "language": self.language, "hypotheses": said}


def read_nbest(path: str | Path) -> list[NBest]:
    """The lists of a file: one JSON object a line, `{"reference": …, "language": …, "hypotheses": [{"text": …,
    "score": …}, …]}`, where `language` may be left out.

    Raises:
        DataError: the file can't be read, holds no list, or a line is of another form; with the line's number.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"'{path}' can't be read: {error}") from error
    found = [_of_line(line, f"'{path}', line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise DataError(f"'{path}' holds no n-best list")
    return found


def _of_line(line: str, where: str) -> NBest:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("reference"), str):
        raise DataError(f'{where}: not of the form {{"reference": "…", "hypotheses": [{{"text": "…", "score": 0.0}}]}}')
    language, said = values.get("language"), values.get("hypotheses")
    if language is not None and not isinstance(language, str):
        raise DataError(f"{where}: language must be a code such as 'en', not {language!r}")
    if not isinstance(said, list) or not said:
        raise DataError(f"{where}: no hypotheses")
    hypotheses = []
    for one in said:
        score = one.get("score") if isinstance(one, dict) else None
        number = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
        if not number or not isinstance(one.get("text"), str):
            raise DataError(f"{where}: a hypothesis must hold a text and a finite score, not {one!r}")
        hypotheses.append(Hypothesis(one["text"], float(score)))
    return NBest(values["reference"], tuple(hypotheses), language)


def nbest_lines(lists: Iterable[NBest]) -> str:
    """Lists as `read_nbest` reads them."""
    return "".join(json.dumps(one.to_dict(), ensure_ascii=False) + "\n" for one in lists)


def usable(lists: Sequence[NBest]) -> tuple[list[NBest], str]:
    """The lists whose reference holds a word once it is normalised, and a line on those that don't; else empty.

    Raises:
        DataError: none is left.
    """
    kept = [one for one in lists if normaliser(one.language)(one.reference)]
    if not kept:
        raise DataError("no reference holds a word")
    lost = len(lists) - len(kept)
    return kept, f"{lost} of {len(lists)} utterances are left out: no word in their reference" if lost else ""
