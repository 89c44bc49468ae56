"""Recordings in a local folder: sound or video files with transcripts beside them or in `metadata.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from hfprune.errors import DataError
from hfprune.hub.reach import missing_path
from hfprune.speech.audio import seconds_of
from hfprune.speech.captions import CAPTION_FILES, read_captions, text_of
from hfprune.speech.recordings import METADATA, SOUND_FILES
from hfprune.wild.plan import Plan, PlanItem, choose_language


def plan_folder(
    folder: str | Path, language: str | None = None, name: str | None = None, limit: int | None = None
) -> Plan:
    """A plan of the recordings in a folder and its sub-folders.

    A transcript is `NAME.srt`, `NAME.vtt` or `NAME.txt` beside `NAME.mp4`, with its language `NAME.en-GB.srt`, or the
    `text` (or `transcription`) of the file's line in `metadata.jsonl` at the top, which may also say `language`,
    `category`, `title`, `region`, `licence` and `conditions`.

    Args:
        folder: where they lie.
        language: what is spoken where no file says it; of several transcripts the one that comes nearest is taken.
        name: of the plan; by default the folder's.
        limit: how many recordings at most, in the order of their names.

    Raises:
        DataError: no such folder, a `metadata.jsonl` that can't be read, or no recording with a transcript.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DataError(f"no folder '{folder}'; {missing_path(str(folder))}")
    said = _metadata(root)
    found = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.suffix.lower() in SOUND_FILES}
    found = {key for key in found if not any(part.startswith(".") for part in Path(key).parts)}
    items = [_item(root, key, said.get(key, {}), language) for key in sorted(found | set(said))[:limit]]
    args = {"folder": str(root.resolve())} | ({"relevanceLanguage": language} if language else {})
    return Plan(name=name or root.resolve().name, source="folder", args=args, items=items).require_items()


def reference_of(plan: Plan, item: PlanItem, language: str | None) -> tuple[str, str | None]:
    """The reference of a recording, and its language.

    Raises:
        DataError: there is none in this language, or its file can't be read.
    """
    if _is_outside(item.key):
        raise DataError(f"'{item.key}' lies outside the plan's folder")
    if item.text is not None:
        return item.text, item.default_audio_language or language
    root = Path(plan.args["folder"])
    transcripts = dict(_transcripts(root / item.key))
    wanted = language or item.default_audio_language
    code = _chosen(transcripts, wanted)
    try:
        text = text_of(read_captions(transcripts[code]))
    except DataError as error:
        raise DataError(str(error).replace(f"{root}/", "")) from error
    return text, code or item.default_audio_language or wanted


def _metadata(root: Path) -> dict[str, dict[str, Any]]:
    """The lines of `metadata.jsonl` by their file."""
    path = root / METADATA
    if not path.is_file():
        return {}
    rows = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"'{path}' can't be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name = str(row["file_name"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"'{path}', line {number}: not a JSON object with a `file_name`") from error
        if _is_outside(name):
            raise DataError(f"'{path}', line {number}: '{name}' lies outside the folder")
        rows[Path(name).as_posix()] = row
    return rows


def _is_outside(name: str) -> bool:
    return Path(name).is_absolute() or ".." in Path(name).parts


def _item(root: Path, key: str, row: dict[str, Any], language: str | None) -> PlanItem:
    path = root / key
    text = row.get("text", row.get("transcription"))
    facts = {field: _text(row.get(field)) for field in ("category", "title", "region", "licence")}
    item = PlanItem(
        key=key,
        **facts | {"title": facts["title"] or path.stem},
        default_audio_language=_text(row.get("language")) or language,
        text=_text(text),
        conditions=row.get("conditions") if isinstance(row.get("conditions"), dict) else None,
    )
    if facts["category"] is None and len(Path(key).parts) > 1:
        item.category = Path(key).parts[0]
    try:
        if not path.is_file():
            raise DataError("there is no such file")
        item.duration = timedelta(seconds=seconds_of(path))
        if text is None:
            transcripts = dict(_transcripts(path))
            code = _chosen(transcripts, language or item.default_audio_language)
            item.captions = transcripts[code].relative_to(root).as_posix()
            item.default_audio_language = _text(row.get("language")) or code or language
            item.manually_created_transcripts = sorted(filter(None, transcripts))
    except DataError as error:
        item.reason = str(error).replace(f"{root}/", "")
    return item


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _transcripts(path: Path) -> Iterator[tuple[str | None, Path]]:
    """Transcripts beside a recording by their language, None where their name has none; srt goes before vtt and txt."""
    for suffix in reversed(CAPTION_FILES):
        for found in sorted(path.parent.glob(f"*{suffix}")):
            middle = found.name.removesuffix(suffix)
            if middle == path.stem:
                yield None, found
            elif middle.startswith(f"{path.stem}.") and _is_code(code := middle.removeprefix(f"{path.stem}.")):
                yield code.replace("_", "-"), found


def _is_code(text: str) -> bool:
    first, *rest = text.replace("_", "-").split("-")
    return 2 <= len(first) <= 3 and all(part.isalnum() for part in (first, *rest))


def _chosen(transcripts: dict[str | None, Path], language: str | None) -> str | None:
    """The language of the transcript that is the reference."""
    codes = [code for code in transcripts if code is not None]
    if language is None and None not in transcripts and len(codes) > 1:
        raise DataError(f"transcripts in several languages ({', '.join(sorted(codes))}): say which with --language")
    code = choose_language(codes, language) if language else min(codes, default=None)
    if code is not None:
        return code
    if None in transcripts:
        return None
    if codes:
        raise DataError(f"no transcript in '{language}'; there is: {', '.join(sorted(codes))}")
    raise DataError("no transcript beside it (.srt, .vtt or .txt of the same name)")
