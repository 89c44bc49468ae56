"""TrainingArguments from a recipe: checked by name and type before anything is loaded."""

from __future__ import annotations

import dataclasses
import enum
import math
import re
import typing
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from hfprune.errors import ConfigError
from hfprune.registry import did_you_mean
from hfprune.strict import unquoted

_DEFAULTS = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "logging_strategy": "epoch",
    "save_total_limit": 2,
    "report_to": "none",
    "disable_tqdm": False,
    "ddp_find_unused_parameters": False,
}
_UNLIMITED = math.inf
# The least and the most of what TrainingArguments take as it comes.
_BOUNDS = {
    "learning_rate": (0, _UNLIMITED),
    "weight_decay": (0, _UNLIMITED),
    "seed": (0, _UNLIMITED),
    "num_train_epochs": (0, _UNLIMITED),
    "max_steps": (-1, _UNLIMITED),
    "warmup_steps": (0, _UNLIMITED),
    "gradient_accumulation_steps": (1, _UNLIMITED),
    "per_device_train_batch_size": (1, _UNLIMITED),
    "per_device_eval_batch_size": (1, _UNLIMITED),
    "dataloader_num_workers": (0, _UNLIMITED),
    "dataloader_prefetch_factor": (1, _UNLIMITED),
    "eval_accumulation_steps": (1, _UNLIMITED),
    "logging_steps": (0, _UNLIMITED),
    "eval_steps": (0, _UNLIMITED),
    "eval_delay": (0, _UNLIMITED),
    "save_steps": (0, _UNLIMITED),
    "torch_empty_cache_steps": (1, _UNLIMITED),
    "ddp_timeout": (1, _UNLIMITED),
    "neftune_noise_alpha": (0, _UNLIMITED),
    "label_smoothing_factor": (0, 1),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, _UNLIMITED),
    "max_grad_norm": (0, _UNLIMITED),
    "generation_max_length": (2, _UNLIMITED),
    "generation_num_beams": (1, _UNLIMITED),
}
_OWN_KEYS = {
    "output_dir": "output.folder",
    "resume_from_checkpoint": "--resume",
    "push_to_hub": "output.push_to_hub",
    "hub_model_id": "output.push_to_hub",
    "hub_private_repo": "output.private",
    "hub_revision": "output.revision",
    "hub_strategy": "output.push_every_step",
    "hub_always_push": "output.push_every_step",
    "hub_token": "`hf auth login` or HF_TOKEN",
}
# The metrics of a recipe are computed once, of all predictions of an evaluation.
_ONLY = {
    "batch_eval_metrics": False,
    "eval_do_concat_batches": True,
    "prediction_loss_only": False,
    "predict_with_generate": True,
}
# What TrainingArguments raise for values that they can't make sense of.
_REFUSALS = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, OSError)


def training_arguments(
    folder: str,
    training: dict[str, Any],
    baseline: dict[str, Any] | None = None,
    *,
    metric: str | None = None,
    greater_is_better: bool | None = None,
    task: str = "",
) -> TrainingArguments:
    """TrainingArguments from the recipe's `training:`, for the baseline with its own fields over them.

    Args:
        folder: where checkpoints go.
        training: any TrainingArguments field by its own name.
        baseline: fields that replace those of `training`; `epochs` stands for `num_train_epochs`.
        metric: what is watched unless the recipe names a `metric_for_best_model`.
        greater_is_better: whether that is to grow.
        task: of the recipe; recognisers are evaluated by what they generate, and take fields that say how.

    Raises:
        ConfigError: an unknown field, with the nearest known one; a value of the wrong type; fields that do not go
            together.
    """
    values: dict[str, Any] = {**_DEFAULTS, "use_cpu": not torch.cuda.is_available()}
    keys = recipe_keys(training, baseline)
    kind = Seq2SeqTrainingArguments if task == "speech-recognition" else TrainingArguments
    if kind is Seq2SeqTrainingArguments:
        # Recognisers leave out layers at random, and hold parameters that only training with masked sound uses.
        values |= {"predict_with_generate": True, "ddp_find_unused_parameters": True}
    for name, key in keys.items():
        section, _, written = key.partition(".")
        values[name] = _checked(key, name, (training if section == "training" else baseline)[written], kind)
    if keys.get("num_train_epochs") == "baseline.epochs" and "max_steps" not in baseline:
        values["max_steps"] = -1
    if metric is not None and "metric_for_best_model" not in keys:
        values = {"greater_is_better": greater_is_better} | values | {"metric_for_best_model": metric}
    try:
        return kind(output_dir=folder, **values)
    except _REFUSALS as error:
        key = _culprit(kind, folder, values, keys) or key_named_in(error, keys)
        raise ConfigError(f"{key}: {' '.join(str(error).split())}") from error


def recipe_keys(training: dict[str, Any], baseline: dict[str, Any] | None = None) -> dict[str, str]:
    """The key under which a recipe says each TrainingArguments field that it says."""
    keys = {name: f"training.{name}" for name in training}
    for name in baseline or {}:
        keys["num_train_epochs" if name == "epochs" else name] = f"baseline.{name}"
    return keys


def key_named_in(error: BaseException, keys: dict[str, str]) -> str:
    """The recipe's key of the field that an error speaks of; `training` where it names none that the recipe says."""
    words = set(re.findall(r"\w+", str(error)))
    return next((key for name, key in keys.items() if name in words), "training")


def _culprit(kind: type[TrainingArguments], folder: str, values: dict[str, Any], keys: dict[str, str]) -> str | None:
    """The key of the last field without which the arguments are in order."""
    for name in reversed(keys):
        try:
            kind(output_dir=folder, **{other: value for other, value in values.items() if other != name})
        except _REFUSALS:
            continue
        return keys[name]
    return None


def _checked(key: str, name: str, value: Any, kind: type[TrainingArguments]) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    if name in _OWN_KEYS:
        raise ConfigError(f"{key}: is said elsewhere: use {_OWN_KEYS[name]}")
    if name not in fields:
        raise ConfigError(f"{key}: unknown key; {did_you_mean(name, fields)}")
    if name in _ONLY and value is not _ONLY[name]:
        raise ConfigError(f"{key}: {value!r} leaves the metrics unmeasured that a run watches; leave it out")
    hint = typing.get_type_hints(kind)[name]
    value = _typed(key, value, hint)
    choices = _choices(name, hint, fields[name].metadata)
    if isinstance(value, str) and choices and value not in choices:
        raise ConfigError(f"{key}: unknown '{value}'; {did_you_mean(value, choices)}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        least, most = _BOUNDS.get(name, (-_UNLIMITED, _UNLIMITED))
        if not value >= least:
            raise ConfigError(f"{key}: must be at least {least}, not {value!r}")
        if not value <= most:
            raise ConfigError(f"{key}: must be at most {most}, not {value!r}")
        # Gradients are measured and never clipped below an infinite norm.
        if math.isinf(value) and name != "max_grad_norm":
            raise ConfigError(f"{key}: must be a finite number, not {value!r}")
    return value


def _choices(name: str, hint: Any, metadata: Any) -> list[str]:
    """The words that a field knows; none where it takes any."""
    if name == "torch_compile_backend":
        return [backend.value.lower() for backend in DynamoBackend]
    if name == "torch_compile_mode":
        # Slow to import, and asked for seldom.
        from torch._inductor import list_mode_options

        return list(list_mode_options())
    kinds = [kind for kind in typing.get_args(hint) if isinstance(kind, type) and issubclass(kind, enum.Enum)]
    return [entry.value for kind in kinds for entry in kind] or list(metadata.get("choices", ()))


def _typed(key: str, value: Any, hint: Any) -> Any:
    # Flags that know more than true and false are annotated as words alone.
    if isinstance(value, bool) and key.endswith(".fsdp"):
        return value
    try:
        return TypeAdapter(hint).validate_python(value, strict=True)
    except PydanticSchemaGenerationError:
        return value
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        hint = unquoted(value)
        raise ConfigError(f"{key}: {message[0].lower()}{message[1:]}, not {value!r}{hint}") from error
