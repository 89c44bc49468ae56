"""Texts as the model takes them: truncated for classification, or one stream cut into blocks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

from datasets import Dataset, Features, List, Value
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator

from hfprune.data.sources import text_features
from hfprune.errors import ConfigError, DataError
from hfprune.recipe import DataSection


def prepare_texts(
    train: Dataset, evaluation: Dataset, section: DataSection, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset, Callable, dict[str, Any]]:
    """Training rows, evaluation rows, collator and facts for classification.

    Texts are truncated to `data.max_length` tokens, and padded to the longest of each batch.
    """
    _require_text(train, section)
    if tokenizer.pad_token is None:
        raise ConfigError("data.task: text-classification pads, and the model's tokenizer has no pad token")
    length = min(section.max_length, tokenizer.model_max_length)

    def encode(rows: dict[str, list]) -> dict[str, list]:
        texts = [[text or "" for text in rows[key]] for key in ("text", "text_pair") if key in rows]
        encoded = tokenizer(*texts, truncation=True, max_length=length)
        return {**encoded, "labels": rows["label"]}

    parts = [part.map(encode, batched=True, remove_columns=part.column_names) for part in (train, evaluation)]
    return *parts, DataCollatorWithPadding(tokenizer), {"max_length": length}


def prepare_blocks(
    train: Dataset, evaluation: Dataset, section: DataSection, tokenizer: PreTrainedTokenizerBase, lines: bool
) -> tuple[Dataset, Dataset, Callable, dict[str, Any]]:
    """Training rows, evaluation rows, collator and facts for a language model.

    Texts become one stream of tokens, cut into blocks of `data.block_size`; what is left at the end is dropped.
    Documents are parted by the tokenizer's end-of-text token; the lines of one running text are not.
    """
    _require_text(train, section)
    end = [] if lines or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts = [
        _blocks(part, name, section, tokenizer, end) for part, name in ((train, "training"), (evaluation, "evaluation"))
    ]
    return *parts, default_data_collator, {"block_size": section.block_size}


def _blocks(
    part: Dataset, name: str, section: DataSection, tokenizer: PreTrainedTokenizerBase, end: list[int]
) -> Dataset:
    size = section.block_size

    def tokenize(rows: dict[str, list]) -> dict[str, list]:
        # Longer than the model's own limit is as it should be here: the stream is cut afterwards.
        encoded = tokenizer([text or "" for text in rows["text"]], add_special_tokens=False, verbose=False)
        return {"input_ids": [ids + end for ids in encoded["input_ids"]]}

    def cut(rows: dict[str, list]) -> dict[str, list]:
        stream = list(chain.from_iterable(rows["input_ids"]))
        blocks = [stream[start : start + size] for start in range(0, len(stream) - size + 1, size)]
        return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

    features = Features({"input_ids": List(Value("int64")), "labels": List(Value("int64"))})
    tokens = part.map(tokenize, batched=True, remove_columns=part.column_names)
    # Cutting large batches of rows drops at most one block's rest per batch.
    blocks = tokens.map(cut, batched=True, batch_size=10_000, remove_columns=tokens.column_names, features=features)
    if not len(blocks):
        raise DataError(f"data.block_size: {size} tokens a block, but the {name} text of '{section.name}' has fewer")
    return blocks


def _require_text(part: Dataset, section: DataSection) -> None:
    held = text_features(part)
    for column in ("text", "text_pair"):
        if column in part.column_names and column not in held:
            raise DataError(f"data.text_columns: a column of '{section.name}' that holds no text was named")
