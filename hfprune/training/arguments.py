"""TrainingArguments from a recipe: checked by name and type before anything is loaded."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import torch
from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError
from transformers import TrainingArguments

from hfprune.errors import ConfigError
from hfprune.registry import did_you_mean

_DEFAULTS = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "logging_strategy": "epoch",
    "save_total_limit": 2,
    "report_to": "none",
    "disable_tqdm": False,
    "ddp_find_unused_parameters": False,
}
_LEAST = {
    "learning_rate": 0,
    "weight_decay": 0,
    "seed": 0,
    "num_train_epochs": 0,
    "max_steps": -1,
    "warmup_steps": 0,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "dataloader_num_workers": 0,
    "label_smoothing_factor": 0,
    "max_grad_norm": 0,
}
_OWN_KEYS = {"output_dir": "output.folder", "resume_from_checkpoint": "--resume"}


def training_arguments(
    folder: str, training: dict[str, Any], baseline: dict[str, Any] | None = None, **known: Any
) -> TrainingArguments:
    """TrainingArguments from the recipe's `training:`, for the baseline with its own fields over them.

    Args:
        folder: where checkpoints go.
        training: any TrainingArguments field by its own name.
        baseline: fields that replace those of `training`; `epochs` stands for `num_train_epochs`.
        known: defaults that the recipe may replace.

    Raises:
        ConfigError: an unknown field, with the nearest known one; a value of the wrong type; fields that do not go
            together.
    """
    values: dict[str, Any] = {**_DEFAULTS, "use_cpu": not torch.cuda.is_available(), **known}
    values |= _checked("training", training)
    if baseline is not None:
        renamed = {("num_train_epochs" if key == "epochs" else key): value for key, value in baseline.items()}
        if "epochs" in baseline and "max_steps" not in baseline:
            values["max_steps"] = -1
        values |= _checked("baseline", renamed)
    try:
        return TrainingArguments(output_dir=folder, **values)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"training: {' '.join(str(error).split())}") from error


def _checked(section: str, values: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    hints = typing.get_type_hints(TrainingArguments)
    checked = {}
    for key, value in values.items():
        if key in _OWN_KEYS:
            raise ConfigError(f"{section}.{key}: is said elsewhere: use {_OWN_KEYS[key]}")
        if key not in names:
            raise ConfigError(f"{section}.{key}: unknown key; {did_you_mean(key, names)}")
        checked[key] = _typed(f"{section}.{key}", value, hints[key])
        least = _LEAST.get(key)
        if least is not None and isinstance(checked[key], int | float) and not checked[key] >= least:
            raise ConfigError(f"{section}.{key}: must be at least {least}, not {value!r}")
    return checked


def _typed(key: str, value: Any, hint: Any) -> Any:
    try:
        return TypeAdapter(hint).validate_python(value)
    except PydanticSchemaGenerationError:
        return value
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise ConfigError(f"{key}: {message[0].lower()}{message[1:]}, not {value!r}") from error
