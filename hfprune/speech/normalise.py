"""Normalisers: both sides of a comparison are written alike before words are counted, by Whisper's rules."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from hfprune.speech.needs import needed

LETTERS = ("zh", "ja", "th", "lo", "my", "yue")
"""Languages that put no spaces between words: each of their letters counts as a word."""


def code_of(language: str | None) -> str | None:
    """The language of a code such as `en-GB`: `en`."""
    return language.replace("_", "-").partition("-")[0].lower() if language else None


@lru_cache
def normaliser(language: str | None) -> Callable[[str], str]:
    """How texts of a language are written before they are compared: English by its own rules, others by basic ones.

    Source: Radford 2022, arXiv 2212.04356, appendix C.

    Args:
        language: a code such as `en` or `de-AT`; None where it isn't known.
    """
    code = code_of(language)
    if code == "en":
        normalise = needed("whisper_normalizer.english").EnglishTextNormalizer()
    else:
        normalise = needed("whisper_normalizer.basic").BasicTextNormalizer(split_letters=code in LETTERS)
    return lambda text: " ".join(normalise(text).split())
