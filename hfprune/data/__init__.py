"""Data for training and evaluation, from its name in the recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from torch import nn

from hfprune.data.columns import encode_labels, named_columns, unlabelled
from hfprune.data.images import prepare_images
from hfprune.data.sources import is_lines, open_splits
from hfprune.data.speech import prepare_speech
from hfprune.data.text import prepare_blocks, prepare_texts
from hfprune.errors import ConfigError, DataError
from hfprune.recipe import DataSection
from hfprune.registry import did_you_mean

EVAL_SPLITS = ("test", "validation", "validation_matched", "valid", "dev", "eval")

__all__ = ["PreparedData", "RawData", "open_data", "prepare"]


@dataclass
class RawData:
    """Data as its source gives it, its columns named `image`, `audio` or `text` (and `text_pair`), and `label`.

    Attributes:
        train, evaluation: the two splits.
        labels: the names of the classes; None where there are none, as for causal-lm.
        task: of the recipe.
        section: the recipe's `data:`.
        lines: whether the rows are lines of one running text.
    """

    train: Dataset
    evaluation: Dataset
    labels: list[str] | None
    task: str
    section: DataSection
    lines: bool = False


@dataclass
class PreparedData:
    """Data as transformers' Trainer takes it.

    Attributes:
        train, evaluation: indexed datasets whose rows are dicts.
        collator: rows to a batch: `pixel_values`, `labels`; `input_ids`, `attention_mask`, `labels`; `input_ids`,
            `labels`; or `input_values` or `input_features`, `labels`.
        facts: how the data was brought into shape: image size, channels, mean and std, block size, or sampling rate;
            and `left_out`, a line on what could not be used.
    """

    train: Any
    evaluation: Any
    collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]
    facts: dict[str, Any] = field(default_factory=dict)

    def example(self, batch_size: int = 1) -> dict[str, torch.Tensor]:
        """A batch of the evaluation data without its labels; rows repeat where there are fewer than asked for."""
        rows = [self.evaluation[index % len(self.evaluation)] for index in range(batch_size)]
        batch = self.collator(rows)
        return {key: value for key, value in batch.items() if key != "labels"}


def open_data(section: DataSection, seed: int) -> RawData:
    """Opens the splits, finds the columns, draws the samples.

    Args:
        section: the recipe's `data:`.
        seed: of what is drawn: the samples, and the part held out where there is no split to evaluate on.

    Raises:
        DataError: data that is missing, unreadable or of the wrong form.
        ConfigError: a split, column or configuration that is not there.
        NotReachable: the dataset lies on the Hub, and the Hub can't be reached.
    """
    splits = open_splits(section)
    train = _split(splits, section.train_split, "train_split", section)
    columns = named_columns(section, train)
    lines = is_lines(section)
    evaluation = _evaluation(splits, section, columns)
    parts = [_renamed(part, columns, section) for part in ([train] if evaluation is None else [train, evaluation])]
    labels = None
    if section.task in ("image-classification", "text-classification"):
        parts, labels = encode_labels(parts, section)
    if len(parts) == 1:
        parts = _hold_out(parts[0], section.eval_fraction, seed, lines)
    drawn = [
        _draw(part, count, seed, lines)
        for part, count in zip(parts, (section.train_samples, section.eval_samples), strict=True)
    ]
    for name, part in zip(("train", "evaluation"), drawn, strict=True):
        if not len(part):
            raise DataError(f"data.name: '{section.name}' has no rows for {name}")
    return RawData(*drawn, labels=labels, task=section.task, section=section, lines=lines)


def prepare(raw: RawData, model: nn.Module, processing_class: Any, seed: int) -> PreparedData:
    """Brings the data into the shape that the model takes.

    Where the recipe gives an image size, mean or std, they are written into the model's config or image processor too,
    so that whoever loads the saved model prepares images as it was trained.

    Args:
        raw: from `open_data`.
        model: says image size, channels and normalisation.
        processing_class: the tokenizer, for text; the processor, for speech; the image processor, where there is one.
        seed: of the random shifts.

    Raises:
        DataError: images or texts that can't be read.
        ConfigError: a recipe that asks for what the model can't take.
    """
    if raw.task == "image-classification":
        return PreparedData(*prepare_images(raw.train, raw.evaluation, raw.section, model, processing_class, seed))
    if raw.task == "speech-recognition":
        return PreparedData(*prepare_speech(raw.train, raw.evaluation, raw.section, model, processing_class))
    if processing_class is None:
        raise ConfigError(f"data.task: {raw.task} needs a tokenizer, and the model has none")
    if raw.task == "text-classification":
        return PreparedData(*prepare_texts(raw.train, raw.evaluation, raw.section, processing_class))
    return PreparedData(*prepare_blocks(raw.train, raw.evaluation, raw.section, processing_class, raw.lines))


def _split(splits: dict[str, Dataset], name: str, key: str, section: DataSection) -> Dataset:
    if name not in splits:
        raise ConfigError(f"data.{key}: '{section.name}' has no split '{name}'; {did_you_mean(name, splits)}")
    return splits[name]


def _evaluation(splits: dict[str, Dataset], section: DataSection, columns: dict[str, str]) -> Dataset | None:
    """The split to evaluate on, None where one must be held out; one without labels only where it is asked for."""
    if section.eval_split is not None:
        if section.eval_split == section.train_split:
            raise ConfigError(f"data.eval_split: '{section.eval_split}' is the training split; leave it out")
        return _split(splits, section.eval_split, "eval_split", section)
    label = next((column for column, meaning in columns.items() if meaning == "label"), None)
    for name in EVAL_SPLITS:
        if name in splits and name != section.train_split:
            if label is not None and (label not in splits[name].column_names or unlabelled(splits[name], label)):
                continue
            return splits[name]
    return None


def _renamed(part: Dataset, columns: dict[str, str], section: DataSection) -> Dataset:
    missing = [column for column in columns if column not in part.column_names]
    if missing:
        hint = did_you_mean(missing[0], part.column_names)
        raise DataError(f"data.eval_split: '{section.name}' has no column '{missing[0]}' in it; {hint}")
    part = part.select_columns(list(columns))
    for column, meaning in columns.items():
        if column != meaning:
            part = part.rename_column(column, meaning)
    return part


def _hold_out(part: Dataset, fraction: float, seed: int, lines: bool) -> list[Dataset]:
    """Training and evaluation rows. A running text is cut once; classes keep their shares where large enough."""
    held = max(1, round(fraction * len(part)))
    if held >= len(part):
        raise DataError(f"data.eval_fraction: {fraction} of {len(part)} rows leaves none to train on")
    if lines:
        return [part.select(range(len(part) - held)), part.select(range(len(part) - held, len(part)))]
    stratify = None
    if isinstance(part.features.get("label"), ClassLabel):
        counts = np.unique(part["label"][:], return_counts=True)[1]
        if counts.min() > 1 and len(counts) <= min(held, len(part) - held):
            stratify = "label"
    halves = part.train_test_split(test_size=held, seed=seed, stratify_by_column=stratify)
    return [halves["train"], halves["test"]]


def _draw(part: Dataset, count: int | None, seed: int, lines: bool) -> Dataset:
    """So many rows in their order; of a running text one passage."""
    if count is None or count >= len(part):
        return part
    generator = np.random.default_rng(seed)
    if lines:
        start = int(generator.integers(len(part) - count + 1))
        return part.select(range(start, start + count))
    return part.select(np.sort(generator.choice(len(part), size=count, replace=False)))
