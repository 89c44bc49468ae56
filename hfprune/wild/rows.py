"""Recordings in a dataset: one of the Hub, or a parquet file or folder of them on this machine."""

from __future__ import annotations

from typing import Any

from datasets import Audio, Dataset

from hfprune.data.columns import TRANSCRIPT_NAMES
from hfprune.data.sources import open_splits, text_features
from hfprune.errors import ConfigError, DataError, HfpruneError
from hfprune.recipe import DataSection
from hfprune.registry import did_you_mean
from hfprune.wild.plan import Plan, PlanItem


def plan_dataset(
    source: str,
    *,
    config: str | None = None,
    split: str | None = None,
    language: str | None = None,
    audio_column: str | None = None,
    text_column: str | None = None,
    name: str | None = None,
    limit: int | None = None,
) -> Plan:
    """A plan of the rows of a dataset.

    Columns `language`, `category`, `title`, `region`, `licence` and `conditions` say what they say in a folder's
    `metadata.jsonl`.

    Args:
        source: the name on the Hub, or a path.
        config: the dataset's configuration, for those that have several.
        split: by default the test split, or the only one.
        language: what is spoken where no column says it.
        audio_column, text_column: by default found by type and by usual names.
        name: of the plan; by default the dataset's.
        limit: how many rows at most, the first ones.

    Raises:
        ConfigError: a configuration, split or column that it does not have.
        DataError: it can't be read, or holds no audio with text.
        NotReachable: it lies on the Hub, and the Hub can't be reached.
    """
    args = {"dataset": source, "config": config}
    splits = _open(args)
    args["split"] = split or ("test" if "test" in splits else next(iter(splits)))
    rows = _split(splits, args)
    args["audioColumn"] = _audio_column(rows, audio_column, source)
    args["textColumn"] = _text_column(rows, text_column, source)
    if language:
        args["relevanceLanguage"] = language
    count = len(rows) if limit is None else min(limit, len(rows))
    facts = [column for column in rows.column_names if column != args["audioColumn"]]
    told = rows.select(range(count)).select_columns(facts)
    items = [_item(f"{args['split']}/{number}", row, args) for number, row in enumerate(told)]
    args = {key: value for key, value in args.items() if value is not None}
    return Plan(
        name=name or source.rstrip("/").split("/")[-1], source="dataset", args=args, items=items
    ).require_items()


class Rows:
    """The sound of a plan's rows, as it lies in the dataset.

    Raises:
        HfpruneError: the dataset can't be opened any more, or is another one.
    """

    def __init__(self, plan: Plan) -> None:
        rows = _split(_open(plan.args), plan.args)
        column = plan.args["audioColumn"]
        if column not in rows.column_names:
            raise DataError(f"'{plan.args['dataset']}' has no column '{column}' any more")
        rows = rows.select_columns([column])
        if isinstance(rows.features[column], Audio):
            rows = rows.cast_column(column, Audio(decode=False))
        self._rows, self._column = rows, column

    def audio(self, item: PlanItem) -> str | bytes:
        """A row's file: its content, or its path.

        Raises:
            DataError: there is no such row, or it holds no sound.
        """
        number = int(item.key.rpartition("/")[2])
        if number >= len(self._rows):
            raise DataError(f"the dataset has no row {number} any more")
        value = self._rows[number][self._column] or {}
        found = value.get("bytes") or value.get("path")
        if not found:
            raise DataError("the row holds no sound")
        return found


def _open(args: dict[str, Any]) -> dict[str, Dataset]:
    try:
        return open_splits(DataSection(name=args["dataset"], config=args.get("config")))
    except HfpruneError as error:
        line = str(error).replace("data.config: ", "--config: ").replace("data.name: ", "")
        raise type(error)(line.replace(": --set data.name=PATH", "")) from error


def _split(splits: dict[str, Dataset], args: dict[str, Any]) -> Dataset:
    if args["split"] not in splits:
        raise ConfigError(f"'{args['dataset']}' has no split '{args['split']}'; {did_you_mean(args['split'], splits)}")
    return splits[args["split"]]


def _audio_column(rows: Dataset, said: str | None, source: str) -> str:
    _check_column(rows, said, source)
    found = [column for column, kind in rows.features.items() if isinstance(kind, Audio)]
    # A parquet file that was not written by `datasets` does not say that a column of bytes and paths is sound.
    found = found or [column for column in ("audio",) if column in rows.column_names]
    if said is None and not found:
        raise DataError(f"'{source}' has no column of audio; there is: {', '.join(rows.column_names)}")
    return said or found[0]


def _text_column(rows: Dataset, said: str | None, source: str) -> str:
    _check_column(rows, said, source)
    texts = text_features(rows)
    found = [column for column in TRANSCRIPT_NAMES if column in texts] or (texts if len(texts) == 1 else [])
    if said is None and not found:
        raise DataError(
            f"'{source}': which column holds the transcripts? name it with --text-column; there is: {', '.join(texts)}"
        )
    return said or found[0]


def _check_column(rows: Dataset, said: str | None, source: str) -> None:
    if said is not None and said not in rows.column_names:
        raise ConfigError(f"'{source}' has no column '{said}'; {did_you_mean(said, rows.column_names)}")


def _item(key: str, row: dict[str, Any], args: dict[str, Any]) -> PlanItem:
    facts = {
        field: row[field] for field in ("category", "title", "region", "licence") if isinstance(row.get(field), str)
    }
    language = row.get("language")
    conditions = row.get("conditions")
    return PlanItem(
        key=key,
        **{"title": key} | facts,
        text=row[args["textColumn"]] or "",
        default_audio_language=language if isinstance(language, str) else args.get("relevanceLanguage"),
        conditions=conditions if isinstance(conditions, dict) else None,
    )
