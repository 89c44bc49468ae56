"""Suspect references: items where the models agree with each other and disagree with the subtitle, with a guess why.

Nothing is excluded for being suspect: a report shows its totals with and without such items.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from statistics import fmean, median
from typing import NamedTuple

from hfprune.speech.needs import needed
from hfprune.wild.report_records import Item, Records, plain

DISAGREE = 0.7
"""Every witness has this word error rate against the subtitle, or a higher one."""
AGREE = 0.3
"""No two witnesses differ by more errors than this, by the words of the longer transcript."""
WITNESS = 0.5
"""A model is a witness if the median of its word error rates is at most this: others say little of a subtitle."""
HEARD = 5
"""Words that every witness must have heard: on fewer, or on silence, models agree by chance."""
SHARED_WORDS = 0.15
"""Of the distinct words of the shorter text; with fewer shared, the reference is another language or another text."""
REPEATED = 0.4
"""Of a reference's runs of three words: with as many that have been there before, it is taken for lyrics."""
DISTINCT = 0.3
"""Distinct words by words, over runs of `RUN` words: with fewer, a reference is a list of keywords."""
RUN = 100
"""Words that are looked at together: in a longer text distinct words are fewer by nature."""
SEPARATORS = 0.3
"""Commas, bars, hashes and their like by words: with more, it is a list of keywords."""
ENOUGH = 20
"""Words that a reference must have before its repetitions say something."""
TOO_MANY, TOO_FEW = 3.0, 1 / 3
"""Words of the reference by those that the witnesses heard."""
TOO_FAST, TOO_SLOW = 500, 5
"""Words a minute of the reference; of languages whose letters count as words these are letters."""

SHOWN = 240
"""Characters of the texts that are shown."""

_SEPARATORS = frozenset(",;|#•·،、")
_JAPANESE_CHINESE = {"HIRAGANA", "KATAKANA", "CJK", "IDEOGRAPHIC"}
_MOST_WORDS = 5000  # of long texts that are compared with each other

THRESHOLDS = {
    "disagree": DISAGREE,
    "agree": AGREE,
    "witness": WITNESS,
    "heard_words": HEARD,
    "shared_words": SHARED_WORDS,
    "repeated": REPEATED,
    "distinct": DISTINCT,
    "separators": SEPARATORS,
    "run_words": RUN,
    "enough_words": ENOUGH,
    "too_many": TOO_MANY,
    "too_few": TOO_FEW,
    "too_fast": TOO_FAST,
    "too_slow": TOO_SLOW,
}


class Suspect(NamedTuple):
    """An item whose reference is in doubt: the lowest WER against it, the highest between models, guesses, and how the
    subtitle and the first witness's transcript begin."""

    item: Item
    least: float
    apart: float
    guesses: tuple[str, ...]
    reference: str
    heard: str


def witnesses(records: Records) -> tuple[str, ...]:
    """The models whose agreement counts: one that has lost its hearing can't speak for or against a subtitle."""
    known = {model: [records.wer(item, model) for item in records.items] for model in records.models}
    measured = {model: [wer for wer in wers if wer is not None] for model, wers in known.items()}
    return tuple(model for model, wers in measured.items() if wers and median(wers) <= WITNESS)


def suspects(records: Records) -> list[Suspect]:
    """The items whose references are in doubt, those first on which the models agree most; none with one witness alone.

    An item counts only where every witness has measured it.
    """
    heard_by = witnesses(records)
    found = []
    for item in records.items if len(heard_by) > 1 else ():
        wers = [records.wer(item, model) for model in heard_by]
        if None in wers or min(wers) < DISAGREE:
            continue
        texts = records.texts(item)
        heard = [texts.hypotheses[model] for model in heard_by]
        if min(len(text.split()) for text in heard) < HEARD:
            continue
        apart = max(_apart(one, other) for one, other in combinations(heard, 2))
        if apart <= AGREE:
            guesses = tuple(guess(texts.reference, texts.normalised, heard, item.numbers.get("duration")))
            found.append(
                Suspect(item, min(wers), apart, guesses, plain(texts.reference, SHOWN), plain(heard[0], SHOWN))
            )
    return sorted(found, key=lambda suspect: (suspect.apart, -suspect.least, suspect.item.number))


def _apart(one: str, other: str) -> float:
    """The word error rate between two hypotheses, the longer one as the reference: at most 1, and the same both ways
    round."""
    long, short = sorted((one.split()[:_MOST_WORDS], other.split()[:_MOST_WORDS]), key=len, reverse=True)
    if not short:
        return 1.0 if long else 0.0
    return float(needed("jiwer").wer(" ".join(long), " ".join(short)))


def guess(reference: str, normalised: str, heard: Sequence[str], seconds: float | None = None) -> list[str]:
    """What may be wrong with a reference, the surest first.

    Args:
        reference: as the subtitle has it.
        normalised: the same as it was compared.
        heard: the witnesses' hypotheses, normalised.
        seconds: of the recording.
    """
    said, words = normalised.split(), [text.split() for text in heard]
    count = fmean(len(text) for text in words)
    found = []
    scripts = script(reference), script(" ".join(heard))
    if None not in scripts and scripts[0] != scripts[1]:
        found.append(f"another language: {scripts[0]} script, and the models wrote {scripts[1]}")
    if _is_keywords(reference, said):
        found.append("search-engine spam: a list of keywords")
    elif _repeated(said) >= REPEATED:
        found.append("lyrics: lines come again and again")
    rate = 60 * len(said) / seconds if seconds else (TOO_FAST + TOO_SLOW) / 2
    if len(said) >= TOO_MANY * count or rate >= TOO_FAST:
        found.append(f"too many words for its length: {len(said):,}, and the models heard {count:,.0f}")
    elif len(said) <= TOO_FEW * count or rate <= TOO_SLOW:
        found.append(f"too few words for its length: {len(said):,}, and the models heard {count:,.0f}")
    if not found and _shared(said, words) <= SHARED_WORDS:
        found.append("another language or another text: hardly a word is shared")
    return found or ["other wording, or a part of the speech: some words are shared"]


def script(text: str) -> str | None:
    """The writing that most letters of a text belong to, such as `Latin`; None where it has no letters."""
    counts: Counter[str] = Counter()
    for letter in text[:5000]:
        if letter.isalpha():
            first = unicodedata.name(letter, "UNKNOWN").partition(" ")[0]
            counts["Chinese or Japanese" if first in _JAPANESE_CHINESE else first.capitalize()] += 1
    return counts.most_common(1)[0][0] if counts else None


def _shared(said: Sequence[str], heard: Sequence[Sequence[str]]) -> float:
    """The share of the distinct words that the reference has in common with a hypothesis, by the shorter of the two."""
    own = set(said)
    return max(len(own & set(words)) / max(1, min(len(own), len(set(words)))) for words in heard)


def _repeated(said: Sequence[str]) -> float:
    """Which share of the runs of three words has been there before."""
    runs = list(zip(said, said[1:], said[2:], strict=False))
    return 1 - len(set(runs)) / len(runs) if len(said) >= ENOUGH else 0.0


def _is_keywords(reference: str, said: Sequence[str]) -> bool:
    if len(said) < ENOUGH:
        return False
    listed = sum(letter in _SEPARATORS for letter in reference) / len(said) >= SEPARATORS
    return listed or (_distinct(said) <= DISTINCT and _repeated(said) < REPEATED)


def _distinct(said: Sequence[str]) -> float:
    """The mean share of distinct words in runs of `RUN` words, without a shorter one at the end."""
    runs = [said[start : start + RUN] for start in range(0, max(1, len(said) - RUN + 1), RUN)]
    return fmean(len(set(run)) / len(run) for run in runs)
