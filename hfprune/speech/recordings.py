"""Recordings in a folder, with what was said in them beside them or in one table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfprune.errors import DataError
from hfprune.speech.captions import CAPTION_FILES, read_captions, text_of
from hfprune.speech.normalise import code_of

METADATA = "metadata.jsonl"
SOUND_FILES = (
    *(".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".wma", ".aif", ".aiff"),
    *(".mp4", ".m4v", ".mkv", ".webm", ".mov", ".avi", ".ogv", ".mpg", ".mpeg"),
)
"""How the names of recordings end, of video with sound too."""
_TEXT_KEYS = ("text", "transcription", "sentence", "transcript")


@dataclass(frozen=True)
class Recording:
    """A recording and its reference.

    Attributes:
        path: of the file of sound or video.
        text: what is said; None where nothing says it.
        language: a code such as `en-GB`, where it is known.
        facts: what else the table says of it: `category`, `title`, `region`, `licence`, `conditions`, `split`.
    """

    path: Path
    text: str | None
    language: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def holds_recordings(folder: Path) -> bool:
    """Whether a folder, or one below it, holds a file of sound or video."""
    return next(_sounds(folder), None) is not None


def read_recordings(folder: Path, language: str | None = None) -> list[Recording]:
    """Every recording in a folder and those below it, in the order of their names.

    What was said comes from `metadata.jsonl` at the top (`file_name`, `text` or `transcription`, and more), else from a
    transcript beside it: NAME.srt, NAME.vtt or NAME.txt, or with its language NAME.en.srt.

    Args:
        language: of transcripts in several languages that is preferred.

    Raises:
        DataError: a table or transcript that can't be read, or a file that the table names and that is not there.
    """
    table = _table(folder)
    found = []
    for path in sorted(_sounds(folder)):
        row = table.pop(path, {})
        text = next((row[key] for key in _TEXT_KEYS if isinstance(row.get(key), str)), None)
        spoken = row.get("language")
        if text is None:
            text, beside = _beside(path, spoken or language)
            spoken = spoken or beside
        facts = {key: value for key, value in row.items() if key not in ("file_name", "language", *_TEXT_KEYS)}
        found.append(Recording(path, text, spoken, facts))
    if table:
        raise DataError(f"'{folder / METADATA}' names '{next(iter(table))}', which is not there")
    return found


def _sounds(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix.lower() in SOUND_FILES and path.is_file())


def _table(folder: Path) -> dict[Path, dict[str, Any]]:
    """The rows of the table, by the file that they are of."""
    path, rows = folder / METADATA, {}
    if not path.is_file():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"'{path}' can't be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"'{path}', line {number}: not valid JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise DataError(f"'{path}', line {number}: has no file_name")
        rows[folder / row["file_name"]] = row
    return rows


def _beside(path: Path, language: str | None) -> tuple[str | None, str | None]:
    """The text of the transcript beside a recording, and the language in its name.

    Of several the wanted language's goes first, then one that names none, then whatever there is.
    """

    def rank(file: Path) -> tuple[bool, bool, bool, int, str]:
        named = _language_of(file, path)
        exact = named is not None and language is not None and named.lower() == language.lower()
        alike = named is not None and code_of(named) == code_of(language)
        return (not exact, not alike, named is not None, CAPTION_FILES.index(file.suffix.lower()), file.name)

    files = [
        file
        for file in path.parent.iterdir()
        if file.suffix.lower() in CAPTION_FILES
        and (file.stem == path.stem or (file.name.startswith(f"{path.stem}.") and _language_of(file, path)))
    ]
    if not files:
        return None, None
    chosen = min(files, key=rank)
    return text_of(read_captions(chosen)), _language_of(chosen, path)


def _language_of(file: Path, recording: Path) -> str | None:
    """`en-GB` of the transcript NAME.en-GB.srt; None of NAME.srt."""
    middle = file.stem[len(recording.stem) :].lstrip(".")
    return middle if middle and all(part.isalnum() for part in middle.replace("_", "-").split("-")) else None
