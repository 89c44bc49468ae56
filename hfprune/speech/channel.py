"""A simulated recogniser: n-best lists of texts that went through a noisy channel, for studies without recordings.

Nothing here hears anything. Each word of a text becomes a choice among itself and the words of a lexicon that are spelt
as if they sounded like it; words may be missed, and short ones heard where there are none. A choice's acoustic score is
minus its distance from what was said, plus Gaussian noise of its own. The lists hold the texts with the highest sums.
What it shares with real recognition is that errors sound alike and that the scores know nothing of language.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from hfprune.speech.nbest import Hypothesis, NBest
from hfprune.speech.needs import needed

_SPELLINGS = (("ph", "f"), ("ght", "t"), ("wh", "w"), ("ck", "k"), ("tion", "Sn"), ("sion", "Sn"), ("sh", "S"),
              ("ch", "C"), ("th", "T"), ("ce", "se"), ("ci", "si"), ("cy", "si"), ("ge", "je"), ("gi", "ji"),
              ("c", "k"), ("q", "k"), ("x", "ks"), ("y", "i"))  # fmt: skip
_ALIKE = ("bp", "dtT", "gk", "vf", "zsSCj", "mn", "lr", "wu", "aeiou")
_CLASS = {letter: number for number, letters in enumerate(_ALIKE) for letter in letters}
_NEAR, _WEAK = 0.4, 0.5
_CHOICES, _LOOK = 8, 40
"""Words that a word may be taken for, out of so many of the nearest spellings."""
_KNOWN = 3
_SHORT, _INSERTED, _EXTRA = 3, 6, 1.0
"""Letters of a word that may be missed, how many of the commonest such words are heard where there are none, and what
that costs beyond their length."""


def sounds(word: str) -> str:
    """A word in a plain phonetic spelling: one letter a sound, roughly as English is spelt."""
    spelt = re.sub(r"^kn", "n", re.sub(r"^wr", "r", word.replace("'", "")))
    for letters, sound in _SPELLINGS:
        spelt = spelt.replace(letters, sound)
    spelt = re.sub(r"(.)\1", r"\1", spelt)
    return spelt[:-1] if len(spelt) > 3 and spelt.endswith("e") else spelt


def distance(one: str, other: str) -> float:
    """Between two phonetic spellings: edits, of which a swap within a kind (b and p, two vowels) costs 0.4, and a vowel
    or an h that comes or goes 0.5."""
    row = [0.0]
    for letter in other:
        row.append(row[-1] + _gap(letter))
    for first in one:
        above, row = row, [row[0] + _gap(first)]
        for index, second in enumerate(other):
            swap = 0.0 if first == second else _NEAR if _alike(first, second) else 1.0
            row.append(min(above[index] + swap, above[index + 1] + _gap(first), row[-1] + _gap(second)))
    return row[-1]


def _alike(one: str, other: str) -> bool:
    return one in _CLASS and _CLASS[one] == _CLASS.get(other)


def _gap(letter: str) -> float:
    return _WEAK if letter in "aeiouh" else 1.0


class Channel:
    """Takes texts for others that sound like them.

    Args:
        lexicon: texts; the words that stand three times in them, and what was said, can be recognised.
        noise: the standard deviation of the acoustic scores, where a swap of unlike sounds costs 1.
        hypotheses: the most of a list.
        seed: of the noise.
    """

    def __init__(self, lexicon: Sequence[str], noise: float = 0.35, hypotheses: int = 16, seed: int = 0):
        counts = Counter(word for text in lexicon for word in text.split())
        self.words = sorted(word for word, count in counts.items() if count >= _KNOWN)
        self.spelt = [sounds(word) for word in self.words]
        short = [word for word, _ in counts.most_common() if len(word) <= _SHORT][:_INSERTED]
        self.inserted = [(word, self._missed(word) + _EXTRA) for word in short]
        self.noise, self.hypotheses = noise, hypotheses
        self.random = np.random.default_rng(seed)
        self.near: dict[str, list[tuple[str, float]]] = {}

    def __call__(self, texts: Sequence[str], language: str | None = None) -> list[NBest]:
        """The n-best list of each text, the likeliest hypothesis first.

        Args:
            texts: words parted by spaces.
            language: what the lists say.
        """
        self._look_up(sorted({word for text in texts for word in text.split()} - set(self.near)))
        return [NBest(text, self._heard(text.split()), language) for text in texts]

    def _look_up(self, words: list[str]) -> None:
        """Finds what words may be taken for: the nearest by plain edits, ranked by distance."""
        process, plain = needed("rapidfuzz.process"), needed("rapidfuzz.distance").Levenshtein.distance
        for start in range(0, len(words), 512):
            some = words[start : start + 512]
            edits = process.cdist([sounds(word) for word in some], self.spelt, scorer=plain, dtype=np.uint8)
            for word, row in zip(some, edits, strict=True):
                heard = sounds(word)
                places = np.argsort(row, kind="stable")[:_LOOK]
                ranked = sorted(
                    (distance(heard, self.spelt[i]), self.words[i]) for i in places if self.words[i] != word
                )
                self.near[word] = [(other, apart) for apart, other in ranked[:_CHOICES]]

    @staticmethod
    def _missed(word: str) -> float:
        return distance(sounds(word), "")

    def _heard(self, words: list[str]) -> tuple[Hypothesis, ...]:
        """The best sums of one choice a word, and between words of nothing or a short one."""
        best: list[tuple[float, tuple[str, ...]]] = [(0.0, ())]
        for number, word in enumerate(words):
            choices = [(word, 0.0), *self.near[word]]
            choices += [("", self._missed(word))] if len(word) <= _SHORT else []
            for slot in ([("", 0.0), *self.inserted] if number else [], choices):
                if slot:
                    noisy = [(self.noise * self.random.standard_normal() - apart, choice) for choice, apart in slot]
                    both = ((s + more, (*said, w) if w else said) for s, said in best for more, w in noisy)
                    best = _largest(both, self.hypotheses)
        return tuple(Hypothesis(" ".join(said), round(score, 4)) for score, said in best)


def _largest(sums: Sequence[tuple[float, tuple[str, ...]]], count: int) -> list[tuple[float, tuple[str, ...]]]:
    """The highest sums, each text once."""
    found: dict[tuple[str, ...], float] = {}
    for score, said in sums:
        found[said] = max(score, found.get(said, score))
    return [(score, said) for said, score in heapq.nlargest(count, found.items(), key=lambda item: item[1])]
