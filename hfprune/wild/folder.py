"""Recordings in a local folder: sound or video files with transcripts beside them or in `metadata.jsonl`."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from hfprune.errors import DataError
from hfprune.hub.reach import missing_path
from hfprune.speech.audio import seconds_of
from hfprune.speech.captions import read_captions, text_of
from hfprune.speech.recordings import (
    Recording,
    Transcripts,
    choose_transcript,
    find_recordings,
    is_outside,
    transcripts_beside,
)
from hfprune.wild.plan import Plan, PlanItem


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
    items = [_item(root, recording, language) for recording in find_recordings(root)[:limit]]
    args = {"folder": str(root.resolve())} | ({"relevanceLanguage": language} if language else {})
    return Plan(name=name or root.resolve().name, source="folder", args=args, items=items).require_items()


def reference_of(plan: Plan, item: PlanItem, language: str | None) -> tuple[str, str | None]:
    """The reference of a recording, and its language.

    Raises:
        DataError: there is none in this language, or its file can't be read.
    """
    if is_outside(item.key):
        raise DataError(f"'{item.key}' lies outside the plan's folder")
    if item.text is not None:
        return item.text, item.default_audio_language or language
    root = Path(plan.args["folder"])
    wanted = language or item.default_audio_language
    code, path = _chosen(transcripts_beside(root / item.key), wanted)
    try:
        text = text_of(read_captions(path))
    except DataError as error:
        raise DataError(str(error).replace(f"{root}/", "")) from error
    return text, code or item.default_audio_language or wanted


def _item(root: Path, recording: Recording, language: str | None) -> PlanItem:
    facts = {field: _text(recording.facts.get(field)) for field in ("category", "title", "region", "licence")}
    conditions = recording.facts.get("conditions")
    item = PlanItem(
        key=recording.key,
        **facts | {"title": facts["title"] or recording.path.stem},
        default_audio_language=recording.language or language,
        text=recording.text,
        conditions=conditions if isinstance(conditions, dict) else None,
    )
    if facts["category"] is None and len(Path(recording.key).parts) > 1:
        item.category = Path(recording.key).parts[0]
    try:
        if not recording.path.is_file():
            raise DataError("there is no such file")
        item.duration = timedelta(seconds=seconds_of(recording.path))
        if recording.text is None:
            code, path = _chosen(recording.transcripts, language or recording.language)
            item.captions = path.relative_to(root).as_posix()
            item.default_audio_language = recording.language or code or language
            item.manually_created_transcripts = sorted(filter(None, recording.transcripts))
    except DataError as error:
        item.reason = str(error).replace(f"{root}/", "")
    return item


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _chosen(transcripts: Transcripts, language: str | None) -> tuple[str | None, Path]:
    """The transcript that is the reference, after its language."""
    chosen = choose_transcript(transcripts, language, "--language")
    if chosen is not None:
        return chosen
    if transcripts:
        raise DataError(f"no transcript in '{language}'; there is: {', '.join(sorted(filter(None, transcripts)))}")
    raise DataError("no transcript beside it (.srt, .vtt or .txt of the same name)")
