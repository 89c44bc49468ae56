"""Rescored: the language models of a comparison, tried on n-best lists of a recogniser."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hfprune.checkpoint.load import from_pretrained
from hfprune.checkpoint.tensors import bytes_on_disk
from hfprune.data.columns import named_columns
from hfprune.data.sources import open_splits
from hfprune.errors import ConfigError, ModelError
from hfprune.grid import SIMULATED, Rescore
from hfprune.models import load_model, processing_class_of
from hfprune.recipe import DataSection, ModelSection, Recipe
from hfprune.registry import did_you_mean
from hfprune.speech.channel import Channel
from hfprune.speech.nbest import NBest, read_nbest, usable
from hfprune.speech.rescoring import LanguageModel, Lists, Tell, rescore

_DEVELOPMENT, _TEST = "validation", "test"
_TURNS = 48
"""Utterances that are timed in turns with the dense model."""


class Rescored:
    """Measures language models on one recogniser's lists.

    Args:
        recipe: its `compare.rescore` says which lists; simulated ones are made of its data.
        model: the dense one, trained or not.
        tokenizer: of all the models.

    Raises:
        ConfigError: the models are no language models, or the data lacks a split for simulated lists.
        DataError: a file that can't be read, or is of another form.
        ModelError: a hypothesis or reference that is longer than the model takes.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, tokenizer: Any):
        wanted = recipe.compare.rescore
        if recipe.data.task != "causal-lm":
            raise ConfigError(f"compare.rescore: ranks with language models, and data.task is {recipe.data.task}")
        self.tokenizer = tokenizer
        test, development = simulated_lists(recipe.data, wanted) if wanted.lists == SIMULATED else _from_files(wanted)
        self.test = Lists(usable(test[: wanted.utterances])[0])
        self.development = None
        if development is not None:
            self.development = Lists(usable(development[: wanted.utterances])[0])
        for lists in filter(None, (self.test, self.development)):
            LanguageModel(model, tokenizer).check(lists.lists)

    def measure(self, model: nn.Module, dense: nn.Module | None = None) -> dict[str, Any]:
        """What a model makes of the lists: `Rescoring.to_dict`, and with the dense model beside it `dense_milliseconds`
        and `speedup`, medians over utterances that both ranked in turns.

        Args:
            model: with a language-modelling head.
            dense: on the CPU; moved to the model's device for the time.
        """
        own = LanguageModel(model, self.tokenizer)
        found = rescore(own, self.test, self.development).to_dict()
        if dense is None:
            return found
        try:
            other = LanguageModel(dense.to(own.device), self.tokenizer)
            turns = [(other.score(one)[1], own.score(one)[1]) for one in self.test.lists[:_TURNS]]
        finally:
            dense.cpu()
        before, after = (statistics.median(turn[side] for turn in turns) for side in (0, 1))
        faster = statistics.median(dense_time / time for dense_time, time in turns)
        return found | {"milliseconds": after, "dense_milliseconds": before, "speedup": faster}


def rescore_with(
    name: str, test: Lists, development: Lists | None = None, batch_size: int = 32, tell: Tell | None = None
) -> dict[str, Any]:
    """What a saved language model makes of n-best lists: `Rescoring.to_dict`, and its `bytes`, on disk for a folder.

    Args:
        name: a checkpoint folder, which is compared with its record first, or a name on the Hub.
        test, development, tell: as `speech.rescoring.rescore` takes them.
        batch_size: hypotheses at once.

    Raises:
        HfpruneError: it can't be loaded, is no causal language model, or can't take the hypotheses.
    """
    model, size = load_language_model(name, batch_size)
    return rescore(model, test, development, tell).to_dict() | {"bytes": size}


def load_language_model(name: str, batch_size: int = 32) -> tuple[LanguageModel, int]:
    """A saved causal language model, on CUDA where there is one, and its bytes, on disk for a folder.

    Raises:
        HfpruneError: it can't be loaded, or is no causal language model.
    """
    section, folder = ModelSection.named(name), Path(name).expanduser()
    if folder.is_dir():
        model = from_pretrained(folder)
        _check_causal(model, name)
        tokenizer = processing_class_of(folder, section, "causal-lm")
        size = bytes_on_disk(folder)
    else:
        loaded = load_model(section, "causal-lm", None)
        model, tokenizer = loaded.model, loaded.processing_class
        _check_causal(model, name)
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if torch.cuda.is_available():
        model.cuda()
    return LanguageModel(model, tokenizer, batch_size), size


def _check_causal(model: nn.Module, name: str) -> None:
    config = getattr(model, "config", None)
    if config is None or not model.can_generate() or config.is_encoder_decoder:
        raise ModelError(f"'{name}' holds {type(model).__name__}, which is no causal language model")


def simulated_lists(section: DataSection, wanted: Rescore) -> tuple[list[NBest], list[NBest]]:
    """Test and development lists, from the splits `test` and `validation` through a noisy channel that knows the words
    of the training split.

    Raises:
        ConfigError: the data lacks one of the splits, or its models are trained or chosen on `test`.
    """
    splits = open_splits(section)
    for name in (section.train_split, _DEVELOPMENT, _TEST):
        if name not in splits:
            raise ConfigError(f"compare.rescore: simulated lists are made of the splits train, validation and test; "
                              f"'{section.name}' has no '{name}'; {did_you_mean(name, splits)}")  # fmt: skip
    if section.eval_split != _DEVELOPMENT or section.train_split in (_DEVELOPMENT, _TEST):
        raise ConfigError(
            "data.eval_split: say `validation`; the lists are made of `test`, which no model may have seen"
        )
    texts = {name: _texts(splits[name], section) for name in (section.train_split, _DEVELOPMENT, _TEST)}
    channel = Channel(texts[section.train_split], wanted.noise, wanted.hypotheses, wanted.seed)
    short = {
        name: [text for text in texts[name] if len(text.split()) <= wanted.words] for name in (_TEST, _DEVELOPMENT)
    }
    if not all(short.values()):
        raise ConfigError(f"compare.rescore.words: no text of '{section.name}' is as short as {wanted.words} words")
    test, development = (channel(short[name][: wanted.utterances]) for name in (_TEST, _DEVELOPMENT))
    return test, development


def _texts(part: Any, section: DataSection) -> list[str]:
    column = next(name for name, meaning in named_columns(section, part).items() if meaning == "text")
    return [" ".join(text.split()) for text in part[column] if text and text.strip()]


def _from_files(wanted: Rescore) -> tuple[list[NBest], list[NBest] | None]:
    return read_nbest(wanted.lists), None if wanted.development is None else read_nbest(wanted.development)
