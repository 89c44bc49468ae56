"""Captions: what was said and when, from SubRip and WebVTT files or plain text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from hfprune.errors import DataError
from hfprune.speech.needs import needed

CAPTION_FILES = (".srt", ".vtt", ".txt")
"""How the names of transcripts end, in the order in which they are looked for beside a recording."""


@dataclass(frozen=True)
class Caption:
    """A line of captions.

    Attributes:
        start, stop: in seconds; the whole recording is `0, inf` where a text says no times.
        text: what was said, without markup.
    """

    start: float
    stop: float
    text: str


def read_captions(path: str | Path) -> list[Caption]:
    """The captions of a file, in order.

    Raises:
        DataError: it can't be read, or holds no text.
    """
    path = Path(path)
    try:
        return captions_of(path.read_text(encoding="utf-8-sig"), path.suffix.lower().lstrip("."), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"'{path}' can't be read: {error}") from error


def captions_of(text: str, kind: str, name: str = "captions") -> list[Caption]:
    """The captions in a text of a kind: `srt`, `vtt` or `txt`.

    Raises:
        DataError: it is not of that kind, or holds no text.
    """
    if kind == "txt":
        found = [Caption(0.0, float("inf"), _plain(text))]
    else:
        pysubs2 = needed("pysubs2")
        try:
            lines = pysubs2.SSAFile.from_string(text, format_=kind)
        except (pysubs2.exceptions.Pysubs2Error, ValueError) as error:
            raise DataError(f"'{name}' is not {kind}: {' '.join(str(error).split())}") from error
        found = [Caption(line.start / 1000, line.end / 1000, _plain(line.plaintext)) for line in lines]
    found = [caption for caption in found if caption.text]
    if not found:
        raise DataError(f"'{name}' holds no text")
    return found


def text_of(captions: list[Caption]) -> str:
    """All that is said, as one line; a line that only repeats the one before it, as rolling captions do, once."""
    kept: list[str] = []
    for caption in captions:
        if not kept or caption.text != kept[-1]:
            kept.append(caption.text)
    return " ".join(kept)


def _plain(text: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", "", text).split())
