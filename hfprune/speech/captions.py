"""Captions: what was said and when, from SubRip and WebVTT files or plain text."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hfprune.errors import DataError
from hfprune.speech.needs import needed
from hfprune.speech.normalise import code_of

CAPTION_FILES = (".srt", ".vtt", ".txt")
"""How the names of transcripts end, in the order in which they are looked for beside a recording."""
NEAR = 0.1
"""Captions that overlap by no more seconds than this count as one after the other."""


class NoText(DataError):
    """A transcript in which nothing is said."""


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
        raise NoText(f"'{name}' holds no text")
    return found


def text_of(captions: list[Caption]) -> str:
    """All that is said, as one line; a line that only repeats the one before it, as rolling captions do, once."""
    kept: list[str] = []
    for caption in captions:
        if not kept or caption.text != kept[-1]:
            kept.append(caption.text)
    return " ".join(kept)


def joined(captions: list[Caption], seconds: float) -> list[Caption]:
    """Consecutive captions as one each, as many as last no longer than so many seconds together.

    What overlaps is never parted, and neither is a line from its own repetition right after it, as in rolling captions;
    so one may be longer than that.
    """
    in_order = sorted(captions, key=lambda caption: caption.start)
    once = _merged(in_order, _repeats)
    apart = _merged(once, lambda last, caption: caption.start < last.stop - NEAR)
    return _merged(apart, lambda last, caption: max(last.stop, caption.stop) - last.start <= seconds)


def _merged(captions: list[Caption], together: Callable[[Caption, Caption], bool]) -> list[Caption]:
    found: list[Caption] = []
    for caption in captions:
        if found and together(found[-1], caption):
            last = found.pop()
            text = last.text if _repeats(last, caption) else f"{last.text} {caption.text}"
            caption = Caption(last.start, max(last.stop, caption.stop), text)
        found.append(caption)
    return found


def _repeats(last: Caption, caption: Caption) -> bool:
    return caption.text == last.text and caption.start <= last.stop + NEAR


def choose_language(available: list[str], language: str) -> str | None:
    """Which of several subtitles is the reference: the language itself, then British and American English, then the
    shortest code of the language; where a variety is asked for (`pt-BR`), it or the language without one, and no other
    variety, which may be written otherwise. None where there is none."""
    alike = [code for code in available if code == language or code.startswith(f"{language}-")]
    alike = alike or [code for code in available if code == code_of(language)]
    first = [code for code in (language, f"{language}-GB", f"{language}-US") if code in alike]
    return first[0] if first else min(alike, key=lambda code: (len(code), code), default=None)


def _plain(text: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", "", text).split())
