"""The test plan: which recordings are to be transcribed, where their references are, and what came of them."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from hfprune.checkpoint.files import write_text
from hfprune.errors import CheckpointError, DataError, and_more
from hfprune.strict import one_line
from hfprune.wild.store import now

Source = Literal["youtube", "folder", "dataset"]
_NEEDED = {"folder": ("folder",), "dataset": ("dataset", "split", "audioColumn")}
"""What a plan says of where its recordings lie."""


class PlanItem(BaseModel):
    """A recording. What is not known is None; names in the file are in camel case, as YouTube's own.

    Attributes:
        key: what it is known by: a video's id, a file's path within its folder, a row's split and number.
        reason: why it can't be tested, where that is known already; a run records it as failed.
        title, category, region, licence: as the source says.
        duration: of the recording; in the file as ISO 8601 (`PT14M41S`).
        default_audio_language: the language that is spoken, as the source says.
        manually_created_transcripts: languages of the subtitles that people made; references come from these alone.
        generated_transcripts: languages of automatic captions, which are never references.
        captions: a file with the reference, within the folder.
        text: the reference itself.
        conditions: what is known of how it was made, e.g. `{"noise": "10 dB"}`.
        results: what came of it, an entry a model.
        failure: why the last run could not test it.
    """

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore")

    key: str = Field(min_length=1)
    title: str | None = None
    reason: str | None = None
    category: str | None = None
    region: str | None = None
    licence: str | None = None
    duration: timedelta | None = None
    default_audio_language: str | None = None
    manually_created_transcripts: list[str] | None = None
    generated_transcripts: list[str] | None = None
    captions: str | None = None
    text: str | None = None
    conditions: dict[str, Any] | None = None
    video_id: str | None = None
    channel_id: str | None = None
    channel_title: str | None = None
    publish_time: str | None = None
    results: list[dict[str, Any]] = Field(default_factory=list)
    failure: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_others(cls, values: Any) -> Any:
        """Mi-Go's items are known by their video and hold the results of one model."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if "key" not in values and "videoId" in values:
            values["key"] = values["videoId"]
        if isinstance(values.get("results"), dict):
            values["results"] = [values["results"]]
        return values


class Plan(BaseModel):
    """A test plan, with the fields of Mi-Go's (Wojnar, Hryszko, Roman, arXiv 2309.00329), whose plans are read too.

    Attributes:
        name: how a report calls it.
        created: when it was made, as ISO 8601.
        source: where its recordings come from.
        args: what was asked for.
        items: the recordings.
        next_page_token: where a search on YouTube goes on.
        region_code, video_category_id: of that search.
    """

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore")

    format_version: Literal[1] = 1
    name: str = "plan"
    created: str = Field(default_factory=now)
    source: Source
    args: dict[str, Any] = Field(default_factory=dict)
    items: list[PlanItem]
    next_page_token: str | None = None
    region_code: str | None = None
    video_category_id: str | None = None

    @property
    def testable(self) -> list[PlanItem]:
        """The items of which nothing is known that keeps them from being tested."""
        return [item for item in self.items if item.reason is None]

    @property
    def language(self) -> str | None:
        """The language that was asked for."""
        return self.args.get("relevanceLanguage")

    def write(self, path: str | Path) -> None:
        """Writes the file so that either the old or the whole new one is there.

        Raises:
            CheckpointError: it can't be written.
        """
        values = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        try:
            write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise CheckpointError(f"the plan '{path}' can't be written: {error.strerror or error}") from error

    def require_items(self) -> Plan:
        """Itself, if something in it can be tested.

        Raises:
            DataError: nothing was found, or nothing of what was found can be tested.
        """
        if not self.items:
            raise DataError("nothing was found that could be tested")
        if not self.testable:
            reasons = list(dict.fromkeys(item.reason or "" for item in self.items))
            raise DataError(f"none of the {len(self.items)} items can be tested: {reasons[0]}{and_more(reasons)}")
        return self


def read_plan(path: str | Path) -> Plan:
    """The plan of a file.

    Raises:
        DataError: there is none, or it is not a plan.
    """
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"the plan '{path}' can't be read: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"the plan '{path}' is not JSON: {error}") from error
    if isinstance(values, dict):
        values.setdefault("name", path.stem)
        if "source" not in values and "relevanceLanguage" in (values.get("args") or {}):
            values |= {"source": "youtube", "created": values.get("created", "")}
    try:
        plan = Plan.model_validate(values)
    except ValidationError as error:
        raise DataError(f"'{path}' is not a test plan: {one_line(error)}") from error
    for name in _NEEDED.get(plan.source, ()):
        if not isinstance(plan.args.get(name), str):
            raise DataError(f"'{path}' is not a test plan: its 'args' has no text '{name}'")
    keys = [item.key for item in plan.items]
    if twice := sorted({key for key in keys if keys.count(key) > 1} if len(set(keys)) < len(keys) else ()):
        raise DataError(f"the plan '{path}' has the item '{twice[0]}' twice")
    return plan
