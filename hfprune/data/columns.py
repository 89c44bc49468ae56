"""Which columns hold what, and classes as indices that are the same in every split."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Array2D, Array3D, Audio, ClassLabel, Dataset, Image, Value

from hfprune.data.sources import CAPTIONS, text_features
from hfprune.errors import ConfigError, DataError
from hfprune.recipe import DataSection
from hfprune.registry import did_you_mean

IMAGE_NAMES = ("image", "img", "pixel_values", "picture", "photo")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "category", "intent")
AUDIO_NAMES = ("audio", "speech", "sound", "recording", "clip", "file", "path", "file_name")
TRANSCRIPT_NAMES = ("text", "transcription", "sentence", "transcript", "normalized_text")
TEXT_NAMES = ("text", "sentence", "content", "document", "review", "story", "tweet")
TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("text1", "text2"),
)


def named_columns(section: DataSection, dataset: Dataset) -> dict[str, str]:
    """The dataset's columns under the names that the rest knows: `image`, `audio`, `text`, `text_pair`, `label`;
    and `captions`, where recordings come with the times of what is said.

    Raises:
        ConfigError: a column named in the recipe is not there, or none or several could be meant.
        DataError: labels that are no classes.
    """
    if section.task == "speech-recognition":
        timed = {"captions": "captions"} if dataset.features.get("captions") == CAPTIONS else {}
        return {_audio_column(section, dataset): "audio", _transcript_column(section, dataset): "text"} | timed
    if section.task == "image-classification":
        found = {_image_column(section, dataset): "image"}
    else:
        texts = _text_columns(section, dataset)
        found = dict(zip(texts, ("text", "text_pair"), strict=False))
    if section.task != "causal-lm":
        label = _label_column(section, dataset, taken=list(found))
        if label in found:
            raise ConfigError(f"data.label_column: '{label}' is the column of the {found[label]}; name another")
        _check_classes(dataset.features[label], section)
        found[label] = "label"
    return found


def _named(section: DataSection, key: str, value: str, dataset: Dataset) -> str:
    if value not in dataset.column_names:
        hint = did_you_mean(value, dataset.column_names)
        raise ConfigError(f"data.{key}: '{section.name}' has no column '{value}'; {hint}")
    return value


def _image_column(section: DataSection, dataset: Dataset) -> str:
    if section.image_column is not None:
        return _named(section, "image_column", section.image_column, dataset)
    pictures = [key for key, kind in dataset.features.items() if isinstance(kind, Image | Array2D | Array3D)]
    return _one_of(section, "image_column", "images", pictures, IMAGE_NAMES, dataset)


def _audio_column(section: DataSection, dataset: Dataset) -> str:
    if section.audio_column is not None:
        return _named(section, "audio_column", section.audio_column, dataset)
    sounds = [key for key, kind in dataset.features.items() if isinstance(kind, Audio)]
    usual = [key for key in dataset.column_names if key.lower() in AUDIO_NAMES]
    return _one_of(section, "audio_column", "recordings", sounds or usual, AUDIO_NAMES, dataset)


def _transcript_column(section: DataSection, dataset: Dataset) -> str:
    if section.text_columns is not None:
        return _text_columns(section, dataset)[0]
    usual = [key for key in text_features(dataset) if key.lower() in TRANSCRIPT_NAMES]
    return _one_of(section, "text_columns", "transcripts", usual, TRANSCRIPT_NAMES, dataset)


def _label_column(section: DataSection, dataset: Dataset, taken: list[str]) -> str:
    if section.label_column is not None:
        return _named(section, "label_column", section.label_column, dataset)
    classes = [key for key, kind in dataset.features.items() if isinstance(kind, ClassLabel)]
    usual = [key for key in dataset.column_names if key.lower() in LABEL_NAMES]
    candidates = [key for key in classes or usual if key not in taken]
    return _one_of(section, "label_column", "classes", candidates, LABEL_NAMES, dataset)


def _one_of(
    section: DataSection, key: str, what: str, candidates: list[str], usual: tuple[str, ...], dataset: Dataset
) -> str:
    if len(candidates) == 1:
        return candidates[0]
    for name in usual:
        for candidate in candidates:
            if candidate.lower() == name:
                return candidate
    many = f"several columns of '{section.name}' could hold the {what}"
    none = f"no column of '{section.name}' looks like {what}"
    raise ConfigError(f"data.{key}: {many if candidates else none}; name one of {', '.join(dataset.column_names)}")


def _text_columns(section: DataSection, dataset: Dataset) -> list[str]:
    if section.text_columns is not None:
        most = 2 if section.task == "text-classification" else 1
        if not 1 <= len(section.text_columns) <= most:
            raise ConfigError(f"data.text_columns: {section.task} takes 1 to {most}, not {len(section.text_columns)}")
        named = [_named(section, "text_columns", value, dataset) for value in section.text_columns]
        for value in named:
            if value not in text_features(dataset):
                kind = _kind_name(dataset.features[value])
                raise ConfigError(f"data.text_columns: '{value}' of '{section.name}' holds {kind}, which is no text")
        return named
    texts = [key for key in text_features(dataset) if key != section.label_column]
    if section.task == "text-classification":
        for pair in TEXT_PAIRS:
            if set(pair) <= set(texts):
                return list(pair)
        if len(texts) > 1:
            texts = [key for key in texts if key.lower() not in LABEL_NAMES]
    return [_one_of(section, "text_columns", "text", texts, TEXT_NAMES, dataset)]


def encode_labels(splits: list[Dataset], section: DataSection) -> tuple[list[Dataset], list[str]]:
    """The splits with `label` as class indices, and the names of the classes.

    Names keep the order of a ClassLabel; other labels are sorted over all splits together. Rows that are marked as
    unlabelled (-1 or missing) are left out.

    Raises:
        DataError: fewer than two classes, or splits without a labelled row.
    """
    kind = splits[0].features["label"]
    if isinstance(kind, ClassLabel):
        names = list(kind.names)
        values: list[Any] = list(range(len(names)))
    else:
        values = sorted({value for split in splits for value in split.unique("label") if value not in (None, -1)})
        names = [str(value) for value in values]
    if len(names) < 2:
        raise DataError(f"data.label_column: '{section.name}' has {len(names)} classes; at least 2 are needed")
    index = {value: position for position, value in enumerate(values)}
    encoded = []
    for split in splits:
        labels = np.array([index.get(value, -1) for value in split.with_format(None)["label"][:]])
        if (labels < 0).any():
            kept = np.flatnonzero(labels >= 0)
            split, labels = split.select(kept), labels[kept]
        if not len(split):
            raise DataError(f"data.label_column: a split of '{section.name}' has no labelled row")
        if split.features["label"] != ClassLabel(names=names):
            split = split.remove_columns("label").add_column("label", labels.tolist(), feature=ClassLabel(names=names))
        encoded.append(split)
    return encoded, names


def _check_classes(kind: Any, section: DataSection) -> None:
    classes = isinstance(kind, Value) and not kind.dtype.startswith(("float", "double", "timestamp"))
    if not classes and not isinstance(kind, ClassLabel):
        raise DataError(f"data.label_column: labels of '{section.name}' are {_kind_name(kind)}, which are no classes")


def unlabelled(dataset: Dataset, column: str) -> bool:
    """Whether no row carries a label, as in the public test splits of competitions."""
    return all(value in (None, -1) for value in dataset.unique(column))


def _kind_name(kind: Any) -> str:
    return kind.dtype if isinstance(kind, Value) else type(kind).__name__
