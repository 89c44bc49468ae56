"""What the commands look at: a model by its name, with the data, the metric and the example that a recipe names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import EvalPrediction
from transformers.trainer_pt_utils import nested_concat

from hfprune.checkpoint.load import from_pretrained
from hfprune.criteria.calibration import to_device
from hfprune.data import PreparedData, open_data, prepare
from hfprune.errors import ConfigError, ModelError
from hfprune.hub.reach import fetch, looks_like_path
from hfprune.metrics import Metrics, metrics_for
from hfprune.models import load_model
from hfprune.recipe import DataSection, ModelSection, Recipe, apply_override
from hfprune.speech.recognisers import generated, kind_of, without_padding
from hfprune.strict import one_line
from hfprune.structure.graph import evaluating
from hfprune.training.loss import takes_no_labels

CALIBRATION_BATCH = 32


@dataclass
class Setting:
    """What an analysis needs.

    Attributes:
        model: with its weights, in evaluation mode.
        data: calibration batches of the training data, drawn once and without augmentation; None without data.
        example_inputs: one example as the model takes it; None where the model alone says it, or nothing does.
        metric: the main metric's name; None without data.
        greater_is_better: whether it is to grow.
        evaluate: from the model to its metrics on the evaluation data, by name.
    """

    model: nn.Module
    data: Any = None
    example_inputs: Any = None
    metric: str | None = None
    greater_is_better: bool = True
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None


def open_setting(
    model: str | None,
    recipe: str | Path | None = None,
    data: str | None = None,
    overrides: list[str] | None = None,
) -> Setting:
    """Opens the model, and the data where some is named.

    Args:
        model: as `model.name` in a recipe; with a recipe it may be left out, and stands for the recipe's model where it
            is given.
        recipe: a recipe's file, of which model, data, metrics and the evaluation's batch size count.
        data: as `data.name` in a recipe, in place of the recipe's.
        overrides: `key.key=value` each, as in a recipe.

    Raises:
        ConfigError: neither model nor recipe, an unknown key.
        HfpruneError: one line, as where a recipe is run.
    """
    overrides = list(overrides or [])
    section, wanted, batch_size, seed = _sections(model, recipe, data, overrides)
    torch.manual_seed(seed)  # a model without weights is drawn as a run of the recipe draws it
    if wanted is None:
        return Setting(_alone(section))
    measured = metrics_for(wanted.metrics, wanted.task, wanted.language)
    raw = open_data(wanted, seed)
    loaded = load_model(section, wanted.task, raw.labels)
    prepared = prepare(raw, loaded.model, loaded.processing_class, seed)
    measured = measured.read_by(loaded.processing_class)
    plain = takes_no_labels(loaded.model)
    example = prepared.example(1)
    return Setting(
        loaded.model,
        _Batches(prepared, plain, seed),
        tuple(example.values()) if plain else example,
        measured.main,
        measured.greater_is_better,
        _Evaluation(prepared, measured, plain, batch_size),
    )


def _sections(
    model: str | None, recipe: str | Path | None, data: str | None, overrides: list[str]
) -> tuple[ModelSection, DataSection | None, int, int]:
    """The model, the data, the evaluation's batch size and the seed."""
    if model is None and recipe is None:
        raise ConfigError("MODEL: missing; name a model, or give a recipe that does: --recipe FILE")
    of_model = [override for override in overrides if override.startswith("model.")]
    rest = [override for override in overrides if not override.startswith("model.")]
    if recipe is not None:
        named = [f"data.name={json.dumps(data)}"] if data is not None else []
        whole = Recipe.from_yaml(recipe, [*rest, *named, *([] if model is not None else of_model)])
        section = whole.model if model is None else ModelSection.named(model, of_model)
        wanted = whole.data.model_copy(update={"augment": False})
        batch = whole.training.get("per_device_eval_batch_size", 64)
        seed = whole.training.get("seed", 0)
        return section, wanted, int(batch), int(seed)
    section = ModelSection.named(model, of_model)
    values: dict[str, Any] = {} if data is None else {"data": {"name": data, "augment": False}}
    for override in rest:
        apply_override(values, override)
    if other := [key for key in values if key != "data"]:
        raise ConfigError(f"--set {other[0]}: only `model` and `data` have keys here; give more with --recipe")
    if not values:
        return section, None, 0, 0
    try:
        return section, DataSection.model_validate(values["data"]), 64, 0
    except ValidationError as error:
        raise ConfigError(one_line(error, "data")) from error


def _alone(section: ModelSection) -> nn.Module:
    """A model by its name, whatever its task, with its weights."""
    name = section.name
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith("timm/") or ":" in name or looks_like_path(name):
            return load_model(section, "image-classification", None).model
        folder = fetch("model.name", name, revision=section.revision, patterns=["*.json", "*.safetensors"])
    if section.args or not section.pretrained:
        return load_model(section, "image-classification", None).model
    if not (folder / "config.json").is_file():
        raise ModelError(f"model.name: '{name}' holds no config.json, which every saved model has")
    return from_pretrained(folder)


@dataclass
class _Batches:
    """Calibration batches: the same in every pass, drawn evenly over a set that may be sorted by its classes."""

    prepared: PreparedData
    plain: bool
    seed: int

    def __iter__(self) -> Iterator[Any]:
        order = np.random.default_rng(self.seed).permutation(len(self.prepared.train)).tolist()
        loader = DataLoader(
            Subset(self.prepared.train, order), CALIBRATION_BATCH, collate_fn=self.prepared.collator, drop_last=False
        )
        for batch in loader:
            yield _pair(batch) if self.plain else dict(batch)


@dataclass
class _Evaluation:
    """The metrics of a recipe, on all the evaluation data."""

    prepared: PreparedData
    metrics: Metrics
    plain: bool
    batch_size: int

    def __call__(self, model: nn.Module) -> dict[str, float]:
        loader = DataLoader(self.prepared.evaluation, self.batch_size, collate_fn=self.prepared.collator)
        device = next(model.parameters()).device
        predictions, references = [], []
        with evaluating(model), torch.no_grad():
            for batch in loader:
                answers = self._answers(model, to_device(batch, device))
                predictions.append(self.metrics.preprocess_logits(answers, batch["labels"]).cpu())
                references.append(batch["labels"])
        # Transcripts of several batches have several lengths.
        found = [reduce(nested_concat, parts).numpy() for parts in (predictions, references)]
        return self.metrics.compute(EvalPrediction(*found))

    def _answers(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        """A batch's logits, or the tokens that a recogniser writes."""
        if kind_of(model) == "seq2seq":
            return generated(model, batch)
        logits = self._logits(model, batch)
        return without_padding(model, logits, batch) if isinstance(logits, torch.Tensor) else logits

    def _logits(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        output = model(*inputs.values()) if self.plain and len(inputs) == 1 else model(**inputs)
        return output.logits if hasattr(output, "logits") else output


def _pair(batch: dict[str, Any]) -> tuple[Any, Any]:
    """Inputs and labels, as a module that knows nothing of names takes them."""
    inputs = [value for key, value in batch.items() if key != "labels"]
    return (inputs[0] if len(inputs) == 1 else {k: v for k, v in batch.items() if k != "labels"}), batch["labels"]
