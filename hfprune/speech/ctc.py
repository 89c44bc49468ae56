"""CTC: the likeliest texts of a recogniser that gives one distribution a frame, with a language model if wanted."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hfprune.errors import DataError
from hfprune.speech.rescoring import LanguageModel

Prefix = tuple[int, ...]
Bonus = Callable[[Sequence[Prefix], bool], Sequence[float]]
"""From prefixes, and whether they are whole utterances, to what each gets beside its acoustic score, in nats."""


@dataclass(frozen=True)
class Beam:
    """What is left at the end of a search.

    Attributes:
        ids: the units, without blanks and repetitions.
        acoustic: their log-probability, a sum over the alignments that the beam kept.
        total: the same with the bonus.
    """

    ids: Prefix
    acoustic: float
    total: float


def prefix_beam_search(
    log_probabilities: np.ndarray,
    *,
    blank: int = 0,
    width: int = 16,
    units: int | None = None,
    bonus: Bonus | None = None,
) -> list[Beam]:
    """The likeliest unit sequences, best first.

    Of each prefix two sums over alignments are kept, of those that end in a blank and those that do not; after every
    frame the `width` prefixes with the highest sum and bonus stay. Source: Graves 2006; Hannun 2014, arXiv 1408.2873.

    Args:
        log_probabilities: (frames, units) in nats.
        blank: the unit that says nothing.
        width: prefixes that are kept.
        units: of each frame only so many of the likeliest are followed, and the blank; by default all.
        bonus: shallow fusion, such as `WordFusion`.

    Raises:
        DataError: log-probabilities of another shape, or that are no numbers.
    """
    frames = np.asarray(log_probabilities, dtype=np.float64)
    if frames.ndim != 2 or not 0 <= blank < frames.shape[1] or np.isnan(frames).any():
        raise DataError("CTC needs log-probabilities (frames, units) without NaN, and a blank among the units")
    # (blank, other): the log-sums of the alignments that end in one or the other.
    kept: dict[Prefix, tuple[float, float]] = {(): (0.0, -math.inf)}
    for frame in frames:
        followed = _followed(frame, blank, units)
        grown: dict[Prefix, list[float]] = defaultdict(lambda: [-math.inf, -math.inf])
        for prefix, (silent, voiced) in kept.items():
            either = np.logaddexp(silent, voiced)
            here = grown[prefix]
            here[0] = np.logaddexp(here[0], either + frame[blank])
            if prefix:
                here[1] = np.logaddexp(here[1], voiced + frame[prefix[-1]])
            for unit in followed:
                # The unit that a prefix ends in comes again only after a blank.
                before = silent if prefix and unit == prefix[-1] else either
                if before > -math.inf:
                    longer = grown[*prefix, unit]
                    longer[1] = np.logaddexp(longer[1], before + frame[unit])
        kept = {prefix: tuple(grown[prefix]) for prefix in _best(grown, width, bonus)}
    prefixes = list(kept)
    acoustic = [float(np.logaddexp(*kept[prefix])) for prefix in prefixes]
    extra = bonus(prefixes, True) if bonus is not None else [0.0] * len(prefixes)
    beams = [Beam(ids, score, score + more) for ids, score, more in zip(prefixes, acoustic, extra, strict=True)]
    return sorted(beams, key=lambda beam: (-beam.total, beam.ids))


def _followed(frame: np.ndarray, blank: int, units: int | None) -> list[int]:
    order = range(len(frame)) if units is None else np.argsort(-frame, kind="stable")[:units]
    return [int(unit) for unit in order if unit != blank and frame[unit] > -math.inf]


def _best(grown: dict[Prefix, list[float]], width: int, bonus: Bonus | None) -> list[Prefix]:
    """The prefixes with the highest sums and bonus; of equal ones the first by its units."""
    prefixes = list(grown)
    totals = [float(np.logaddexp(*grown[prefix])) for prefix in prefixes]
    if bonus is not None:
        totals = [total + more for total, more in zip(totals, bonus(prefixes, False), strict=True)]
    return [
        prefix for _, prefix in sorted(zip(totals, prefixes, strict=True), key=lambda one: (-one[0], one[1]))[:width]
    ]


class WordFusion:
    """Shallow fusion at the ends of words: a prefix's bonus is weight x the language model's log-probability of its
    whole words + penalty x their number. A word counts once the unit between words follows it, or the utterance ends;
    the end of the text is scored only then. What was asked once is remembered.

    Source: Gulcehre 2015, arXiv 1503.03535.

    Args:
        model: the language model.
        units: what each unit writes, `" "` for the one between words and `""` for those that write nothing.
        weight, penalty: of the log-probability, and of a word.
    """

    def __init__(self, model: LanguageModel, units: Sequence[str], weight: float, penalty: float = 0.0):
        self.model, self.units, self.weight, self.penalty = model, units, weight, penalty
        self.known: dict[tuple[str, bool], float] = {("", False): 0.0}

    def __call__(self, prefixes: Sequence[Prefix], whole: bool) -> list[float]:
        """The bonus of each prefix; `whole` where the utterance has ended."""
        texts = [self.words(prefix, whole) for prefix in prefixes]
        new = [text for text in dict.fromkeys(texts) if (text, whole) not in self.known]
        if new:
            found, _ = self.model.log_probabilities(new, end=whole)
            self.known |= {(text, whole): float(value) for text, value in zip(new, found, strict=True)}
        return [self.weight * self.known[text, whole] + self.penalty * len(text.split()) for text in texts]

    def words(self, prefix: Prefix, whole: bool = True) -> str:
        """The text of a prefix; without its last word where that may still grow."""
        text = "".join(self.units[unit] for unit in prefix)
        return " ".join((text if whole else text[: text.rfind(" ") + 1]).split())
