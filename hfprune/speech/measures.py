"""Measures: how a transcript differs from its reference, by jiwer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from hfprune.errors import DataError
from hfprune.speech.needs import needed


@dataclass(frozen=True)
class Measures:
    """What is counted between references and hypotheses, of one pair or of several together.

    Attributes:
        wer: word error rate, (substitutions + deletions + insertions) / reference words; above 1 is possible.
        mer: match error rate, the errors / (the errors + hits).
        wil, wip: word information lost and preserved (Morris 2004).
        cer: character error rate.
        hits, substitutions, deletions, insertions: words.
        words: of the references.
        characters: of the references.
    """

    wer: float
    mer: float
    wil: float
    wip: float
    cer: float
    hits: int
    substitutions: int
    deletions: int
    insertions: int
    words: int
    characters: int

    def to_dict(self) -> dict[str, float | int]:
        """As plain values."""
        return asdict(self)


def measure_texts(references: Sequence[str], hypotheses: Sequence[str]) -> Measures:
    """Measures of several pairs together, the reference first; texts are compared as they are, normalise them before.

    Raises:
        DataError: the numbers of texts differ, there are none, or a reference holds no word.
    """
    jiwer = needed("jiwer")
    if len(references) != len(hypotheses) or not references:
        raise DataError(f"{len(references)} references and {len(hypotheses)} hypotheses can't be compared")
    for number, reference in enumerate(references):
        if not reference.strip():
            raise DataError(f"the reference is empty{f' (number {number})' if len(references) > 1 else ''}")
    words = jiwer.process_words(list(references), list(hypotheses))
    characters = jiwer.process_characters(list(references), list(hypotheses))
    return Measures(
        wer=float(words.wer),
        mer=float(words.mer),
        wil=float(words.wil),
        wip=float(words.wip),
        cer=float(characters.cer),
        hits=words.hits,
        substitutions=words.substitutions,
        deletions=words.deletions,
        insertions=words.insertions,
        words=words.hits + words.substitutions + words.deletions,
        characters=characters.hits + characters.substitutions + characters.deletions,
    )
