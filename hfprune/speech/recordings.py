"""Recordings in a folder, with what was said in them beside them or in one table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hfprune.errors import DataError
from hfprune.speech.captions import CAPTION_FILES, Caption, NoText, choose_language, read_captions, text_of

METADATA = "metadata.jsonl"
SOUND_FILES = (
    *(".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".wma", ".aif", ".aiff"),
    *(".mp4", ".m4v", ".mkv", ".webm", ".mov", ".avi", ".ogv", ".mpg", ".mpeg"),
)
"""How the names of recordings end, of video with sound too."""
_TEXT_KEYS = ("text", "transcription", "sentence", "transcript")

Transcripts = dict[str | None, Path]
"""The transcripts beside a recording by the language in their name, None for one that names none."""


@dataclass(frozen=True)
class Recording:
    """A recording and its reference.

    Attributes:
        key: its path within the folder.
        path: of the file of sound or video.
        text: what is said; None where nothing says it.
        language: a code such as `en-GB`, where it is known.
        facts: what else the table says of it: `category`, `title`, `region`, `licence`, `conditions`, `split`.
        listed: whether the table names it.
        transcripts: those beside it.
        captions: what was said when, where its transcript has times.
    """

    key: str
    path: Path
    text: str | None
    language: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    listed: bool = False
    transcripts: Transcripts = field(default_factory=dict)
    captions: list[Caption] | None = None


def holds_recordings(folder: Path) -> bool:
    """Whether a folder, or one below it, holds a file of sound or video."""
    return any(path.suffix.lower() in SOUND_FILES for path in _files(folder))


def find_recordings(folder: Path) -> list[Recording]:
    """Every recording in a folder and those below it, or that its table names, in the order of their keys; hidden
    files and folders are passed over.

    The table is `metadata.jsonl` at the top: `file_name`, `text` (or `transcription`) and `language`, and more. A
    transcript is NAME.srt, NAME.vtt or NAME.txt beside the recording, or with its language NAME.en.srt. Texts are those
    of the table; transcripts are found, but not read.

    Raises:
        DataError: a table that can't be read, or that names a file outside the folder.
    """
    table, files = _table(folder), list(_files(folder))
    beside = _transcripts(files)
    sounds = {path.relative_to(folder).as_posix() for path in files if path.suffix.lower() in SOUND_FILES}
    found = []
    for key in sorted(sounds | table.keys()):
        path, row = folder / key, table.get(key, {})
        text = next((str(row[name]) for name in _TEXT_KEYS if isinstance(row.get(name), str | int | float)), None)
        spoken = None if row.get("language") is None else str(row["language"])
        facts = {name: value for name, value in row.items() if name not in ("file_name", "language", *_TEXT_KEYS)}
        transcripts = beside.get(path.with_suffix(""), {})
        found.append(Recording(key, path, text, spoken, facts, key in table, transcripts))
    return found


def read_recordings(folder: Path, language: str | None = None) -> list[Recording]:
    """Every recording that `find_recordings` finds, with the text and the times of its transcript where the table has
    no text.

    Args:
        language: of several transcripts the one that comes nearest is read; without one in this language, one whose
            name says none. By default the language that the table says.

    Raises:
        DataError: a table or transcript that can't be read, a file that the table names and that is not there, or
            transcripts in several languages where none is asked for.
    """
    found = []
    for recording in find_recordings(folder):
        if recording.listed and not recording.path.exists():
            raise DataError(f"'{folder / METADATA}' names '{recording.key}', which is not there")
        if recording.text is None:
            try:
                chosen = choose_transcript(recording.transcripts, language or recording.language, "data.language")
            except DataError as error:
                raise DataError(f"'{recording.path}': {error}") from error
            if chosen is not None:
                code, captions = chosen[0], _captions(chosen[1])
                timed = captions if chosen[1].suffix.lower() != ".txt" else None
                spoken = recording.language or code
                recording = replace(recording, text=text_of(captions), language=spoken, captions=timed)
        found.append(recording)
    return found


def _captions(path: Path) -> list[Caption]:
    """Those of a file; none where nothing is said in it, which is no reason to refuse the other recordings."""
    try:
        return read_captions(path)
    except NoText:
        return []


def transcripts_beside(path: Path) -> Transcripts:
    """The transcripts beside one recording."""
    return _transcripts(path.parent.glob("*")).get(path.with_suffix(""), {})


def choose_transcript(transcripts: Transcripts, language: str | None, option: str) -> tuple[str | None, Path] | None:
    """The transcript that is the reference, after the language in its name; None where there is none.

    Args:
        transcripts: those beside a recording.
        language: that is wanted; what names none will do.
        option: by which the user says the language.

    Raises:
        DataError: there are several languages, and none is asked for.
    """
    codes = sorted(code for code in transcripts if code is not None)
    if language is None and None not in transcripts and len(codes) > 1:
        raise DataError(f"transcripts in several languages ({', '.join(codes)}): say which with {option}")
    code = choose_language(codes, language) if language else None if None in transcripts else next(iter(codes), None)
    return (code, transcripts[code]) if code in transcripts else None


def _files(folder: Path) -> Iterator[Path]:
    """What is no folder, hidden ones and what is in them left out."""
    for path in folder.rglob("*"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts) and not path.is_dir():
            yield path


def _transcripts(files: Iterable[Path]) -> dict[Path, Transcripts]:
    """The transcripts among files, by the path of their recording without its ending; srt goes before vtt and txt."""
    texts = [path for path in files if path.suffix.lower() in CAPTION_FILES]
    found: dict[Path, Transcripts] = {}
    for path in sorted(texts, key=lambda path: (CAPTION_FILES.index(path.suffix.lower()), path)):
        name, _, code = path.stem.rpartition(".")
        found.setdefault(path.with_suffix(""), {}).setdefault(None, path)
        if name and _is_code(code):
            found.setdefault(path.with_name(name), {}).setdefault(code.replace("_", "-"), path)
    return found


def _is_code(text: str) -> bool:
    first, *rest = text.replace("_", "-").split("-")
    return 2 <= len(first) <= 3 and all(part.isalnum() for part in (first, *rest))


def _table(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of the table, by the file that they are of."""
    path, rows = folder / METADATA, {}
    if not path.is_file():
        return {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"'{path}' can't be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"'{path}', line {number}: not valid JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not row["file_name"]:
            raise DataError(f"'{path}', line {number}: not a JSON object with a `file_name`")
        if is_outside(row["file_name"]):
            raise DataError(f"'{path}', line {number}: '{row['file_name']}' lies outside the folder")
        rows[Path(row["file_name"]).as_posix()] = row
    return rows


def is_outside(key: str) -> bool:
    """Whether a path within a folder leads out of it."""
    return Path(key).is_absolute() or ".." in Path(key).parts
