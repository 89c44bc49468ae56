"""A model from its name in the recipe: timm, transformers or a function of the user's own."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperForImageClassification,
)

from hfprune.checkpoint.load import from_pretrained
from hfprune.checkpoint.metadata import read_block
from hfprune.checkpoint.timm import wrap_timm
from hfprune.errors import ModelError
from hfprune.hub.origin import read_origin, timm_origin
from hfprune.hub.reach import HUB_ERRORS, fetch, looks_like_path, missing_path, not_reachable
from hfprune.processing import BUILD_ERRORS, first_line, processing_class_of
from hfprune.recipe import ModelSection
from hfprune.registry import did_you_mean
from hfprune.speech.recognisers import kind_of_config

AUTO_CLASSES = {
    "image-classification": AutoModelForImageClassification,
    "text-classification": AutoModelForSequenceClassification,
    "causal-lm": AutoModelForCausalLM,
}

# What older checkpoints lack and only training with masked sound looks at.
UNUSED = ".masked_spec_embed"


@dataclass
class LoadedModel:
    """A model with what belongs to it.

    Attributes:
        model: the module, in evaluation mode.
        processing_class: the tokenizer, the image processor or, of a recogniser, the processor; None for timm, whose
            config says it all, and own modules.
        base_model: the Hub id whose weights were loaded, else None.
        origin: licence, languages, data and base model of the weights that were loaded, as far as they are known.
        maker: for a function of one's own: `import` and `call`, by which the same module is made again.
    """

    model: nn.Module
    processing_class: Any = None
    base_model: str | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    maker: dict[str, str] | None = None


def load_model(section: ModelSection, task: str, labels: list[str] | None) -> LoadedModel:
    """The model that a recipe names.

    Args:
        section: the recipe's `model:`.
        task: of the recipe.
        labels: the names of the classes, None where the task has none.

    Raises:
        ModelError: one line with the key, the value and, where there is one, the nearest valid value.
        NotReachable: the model lies on the Hub, and the Hub can't be reached.
    """
    name = section.name
    local = Path(name).expanduser()
    if local.is_dir():
        loaded = _from_folder(local, section, task, labels)
    elif re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        loaded = _from_function(section, labels)
    elif looks_like_path(name):
        raise ModelError(f"model.name: no folder '{name}'; {missing_path(name)}")
    elif name.startswith("timm/"):
        loaded = _from_timm(section, task, labels)
    else:
        loaded = _from_hub(section, task, labels, name)
    loaded.model.eval()
    return loaded


def load_to_inspect(section: ModelSection) -> nn.Module:
    """The model that a name stands for, whatever its task, with weights only where its structure needs them.

    Raises:
        ModelError: one line, as for `load_model`.
        NotReachable: its config lies on the Hub, and the Hub can't be reached.
    """
    name = section.name
    local = Path(name).expanduser()
    if not local.is_dir() and (name.startswith("timm/") or ":" in name or looks_like_path(name)):
        section = (
            section if "pretrained" in section.model_fields_set else section.model_copy(update={"pretrained": False})
        )
        return load_model(section, "image-classification", None).model
    folder = local if local.is_dir() else fetch("model.name", name, revision=section.revision, patterns=["*.json"])
    block = read_block(folder)
    if block is not None and block.get("plan") is not None:
        if not local.is_dir():
            folder = fetch("model.name", name, revision=section.revision, patterns=["*.json", "*.safetensors"])
        return from_pretrained(folder)
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "architecture" in values:
        here = section.model_copy(update={"name": str(folder), "pretrained": False})
        return load_model(here, "image-classification", None).model
    kind = getattr(transformers, (values.get("architectures") or [""])[0], None)
    if kind is None:
        raise ModelError(f"model.name: '{name}' names no class of transformers; give `package.module:function` instead")
    try:
        config = AutoConfig.from_pretrained(folder)
        for key, value in section.args.items():
            if not hasattr(config, key):
                raise ModelError(f"model.args.{key}: no such value in the config; {_nearest(key, config.to_dict())}")
            setattr(config, key, value)
        return kind(config).eval()
    except (OSError, *BUILD_ERRORS) as error:
        raise ModelError(_build_error(error, section)) from error


def _from_timm(section: ModelSection, task: str, labels: list[str] | None) -> LoadedModel:
    name = section.name.removeprefix("timm/")
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        known = timm.list_models()
        raise ModelError(f"model.name: timm has no architecture '{architecture}'; {_nearest(architecture, known)}")
    tags = [entry.partition(".")[2] for entry in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ModelError(f"model.name: timm's {architecture} has no weights '{tag}'; {did_you_mean(tag, tags)}")
    if not section.pretrained:
        return _wrapped(name, section, task, labels, pretrained=False)
    source = timm.get_pretrained_cfg(name)
    if source is None or not source.has_weights:
        raise ModelError(f"model.name: timm has no weights for {name}; --set model.pretrained=false builds random ones")
    if source.hf_hub_id:
        return _from_hub(section, task, labels, source.hf_hub_id)
    try:
        loaded = _wrapped(name, section, task, labels, pretrained=True)
    except HUB_ERRORS as error:
        raise not_reachable("model.name", section.name, error) from None
    loaded.origin = timm_origin(source.to_dict())
    return loaded


def _wrapped(
    source: str, section: ModelSection, task: str, labels: list[str] | None, *, pretrained: bool
) -> LoadedModel:
    """A model that timm builds from a name or `local-dir:` folder, wrapped."""
    if task != "image-classification":
        raise ModelError(f"model.name: '{section.name}' is a timm model, which is for image-classification, not {task}")
    args = dict(section.args)
    if labels is not None and args.setdefault("num_classes", len(labels)) != len(labels):
        raise ModelError(f"model.args.num_classes: {args['num_classes']}, but the data has {len(labels)} classes")
    try:
        if pretrained:
            # With another number of classes timm loads whatever fits and draws the rest anew, silently. So the weights
            # are loaded strictly with the classes they were saved with, and the classifier is exchanged afterwards.
            classes = args.pop("num_classes", None)
            module = timm.create_model(source, pretrained=True, **args)
            if classes is not None and classes != module.num_classes:
                module.reset_classifier(classes)
        else:
            module = timm.create_model(source, pretrained=False, **args)
    except BUILD_ERRORS as error:
        raise ModelError(_build_error(error, section)) from error
    return LoadedModel(wrap_timm(module, labels))


def _from_hub(section: ModelSection, task: str, labels: list[str] | None, hub_id: str) -> LoadedModel:
    small = ["*.json", "*.txt", "*.model", "*.jinja", "README.md"]
    weights = ["model.safetensors", "model-*.safetensors"] if section.pretrained else []
    folder = fetch("model.name", hub_id, revision=section.revision, patterns=small + weights)
    if section.pretrained and not list(folder.glob("*.safetensors")):
        folder = fetch("model.name", hub_id, revision=section.revision, patterns=[*small, "pytorch_model*.bin"])
    loaded = _from_folder(folder, section, task, labels)
    for thing in (loaded.model, loaded.processing_class):
        if hasattr(thing, "name_or_path"):
            thing.name_or_path = hub_id
    if isinstance(loaded.model, PreTrainedModel):
        loaded.model.config.name_or_path = hub_id
    loaded.base_model = hub_id if section.pretrained else None
    return loaded


def _from_folder(folder: Path, section: ModelSection, task: str, labels: list[str] | None) -> LoadedModel:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"model.name: '{section.name}' holds no config.json, which every saved model has")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"model.name: '{path}' is not valid JSON: {error}") from error
    loaded = _from_files(folder, values, section, task, labels)
    loaded.origin = read_origin(folder) if section.pretrained else {}
    return loaded


def _from_files(
    folder: Path, values: dict[str, Any], section: ModelSection, task: str, labels: list[str] | None
) -> LoadedModel:
    """The model in a folder, by the library whose it is."""
    of_timm = "architecture" in values and "model_type" not in values
    changed = section.args or not section.pretrained or (labels and values.get("num_classes") != len(labels))
    if of_timm or (values.get("model_type") == "timm_wrapper" and changed and "quantization_config" not in values):
        # timm adapts its weights to other arguments (image size, channels, classes); transformers would draw them anew.
        return _wrapped(f"local-dir:{folder}", section, task, labels, pretrained=section.pretrained)
    return _from_transformers(folder, section, task, labels)


def _from_transformers(folder: Path, section: ModelSection, task: str, labels: list[str] | None) -> LoadedModel:
    overrides = dict(section.args)
    dtype = overrides.pop("dtype", "float32")
    try:
        config = AutoConfig.from_pretrained(folder)
        for key, value in overrides.items():
            if not hasattr(config, key):
                raise ModelError(f"model.args.{key}: no such value in the config; {_nearest(key, config.to_dict())}")
            setattr(config, key, value)
    except (OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"model.name: '{section.name}' has no readable config: {first_line(error)}") from error
    if labels is not None:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
        config.problem_type = "single_label_classification"
    auto = AUTO_CLASSES[task] if task in AUTO_CLASSES else _recogniser_class(config, section)
    processing_class = processing_class_of(folder, section, task)
    if task == "text-classification" and config.get_text_config().pad_token_id is None:
        config.pad_token_id = processing_class.pad_token_id
    try:
        if not section.pretrained:
            return LoadedModel(auto.from_config(config, dtype=_dtype(dtype)), processing_class)
        model, info = auto.from_pretrained(
            folder, config=config, dtype=_dtype(dtype), ignore_mismatched_sizes=True, output_loading_info=True
        )
    except (*BUILD_ERRORS, OSError) as error:
        raise ModelError(_build_error(error, section)) from error
    _refuse_new_tensors(model, info, section, has_head=labels is not None or auto is AutoModelForCTC)
    return LoadedModel(model, processing_class)


def _recogniser_class(config: PreTrainedConfig, section: ModelSection) -> Any:
    kind = kind_of_config(config)
    if kind is None:
        raise ModelError(f"model.name: '{section.name}' is a {config.model_type} model, which is no recogniser")
    return AutoModelForSpeechSeq2Seq if kind == "seq2seq" else AutoModelForCTC


def _refuse_new_tensors(model: PreTrainedModel, info: dict[str, Any], section: ModelSection, has_head: bool) -> None:
    """Raises where from_pretrained drew anything anew that is not the classification head."""
    changed = [entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]]
    base = f"{model.base_model_prefix}."
    # A wrapped timm model lies under the base prefix as a whole, its head included; timm's own loader changes heads.
    head = has_head and model.base_model is not model and not isinstance(model, TimmWrapperForImageClassification)
    new = sorted(key for key in {*info["missing_keys"], *changed} if not head or key.startswith(base))
    new = [key for key in new if not key.endswith(UNUSED)]
    if new:
        rest = f" and {len(new) - 3} more" if len(new) > 3 else ""
        raise ModelError(
            f"model.name: '{section.name}' lacks tensors of {type(model).__name__}, or has them in another shape: "
            f"{', '.join(new[:3])}{rest}; nothing but a classification head is drawn anew"
        )


def _from_function(section: ModelSection, labels: list[str] | None) -> LoadedModel:
    module_name, _, function_name = section.name.partition(":")
    with _working_folder_importable():
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise ModelError(f"model.name: can't import '{module_name}': {error}") from error
        function = getattr(module, function_name, None)
        if not callable(function):
            functions = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
            hint = _nearest(function_name, functions)
            raise ModelError(f"model.name: '{module_name}' has no function '{function_name}'; {hint}")
        args = dict(section.args)
        signature = _signature(function)
        parameters = signature.parameters
        if labels is not None and "num_labels" in parameters:
            args.setdefault("num_labels", len(labels))
        open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        for key in args:
            if key not in parameters and not open_ended:
                raise ModelError(f"model.args.{key}: {section.name} doesn't take it; {_nearest(key, parameters)}")
        try:
            signature.bind(**args)
        except TypeError as error:
            raise ModelError(f"model.args: {section.name}: {error}") from error
        made = function(**args)
    model, processing_class = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ModelError(f"model.name: {section.name} returned a {type(model).__name__}, not a torch.nn.Module")
    return LoadedModel(model, processing_class, maker=_maker(section.name, args, made))


def _maker(name: str, args: dict[str, Any], made: Any) -> dict[str, str]:
    """What makes the module again, for those who load it."""
    function = name.partition(":")[2]
    call = f"{function}({', '.join(f'{key}={value!r}' for key, value in args.items())})"
    if isinstance(made, tuple):
        return {"import": name, "call": f"{call}[0]"}
    return {"import": name, "call": call if args else function}


def _signature(function: Callable) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except ValueError:
        # Some callables that are written in C don't say what they take.
        return inspect.Signature([inspect.Parameter("args", inspect.Parameter.VAR_KEYWORD)])


@contextmanager
def _working_folder_importable() -> Iterator[None]:
    """A module that lies beside the recipe's run is found as it is by `python`, which a console script does not do."""
    folder = os.getcwd()
    if folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _dtype(name: str | torch.dtype) -> torch.dtype:
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise ModelError(
            f"model.args.dtype: unknown '{name}'; {did_you_mean(name, ['float32', 'bfloat16', 'float16'])}"
        )
    return dtype


def _build_error(error: Exception, section: ModelSection) -> str:
    """One line for arguments or weights that make no model; a mistyped argument is answered with the nearest."""
    if isinstance(error, ModelError):
        return str(error)
    match = re.search(r"(?:(\w+)\.__init__\(\)|\w+\(\)) got an unexpected keyword argument '(\w+)'", str(error))
    if match and match[2] in section.args:
        return f"model.args.{match[2]}: {section.name} doesn't take it{_argument_hint(match[1], match[2], error)}"
    what = f" with {section.args}" if section.args else ""
    return f"model: '{section.name}' can't be built{what}: {first_line(error)}"


def _argument_hint(class_name: str | None, key: str, error: Exception) -> str:
    """The nearest argument of the class whose constructor refused, found in the frames that raised."""
    trace = error.__traceback__
    while trace is not None:
        for value in (*trace.tb_frame.f_locals.values(), *trace.tb_frame.f_globals.values()):
            if inspect.isclass(value) and value.__name__ == class_name:
                return f"; {_nearest(key, inspect.signature(value).parameters)}"
        trace = trace.tb_next
    return ""


def _nearest(name: str, known: Any) -> str:
    """`did_you_mean`, but silent about all of a long list."""
    known = list(known)
    hint = did_you_mean(name, known)
    return "nothing is named like it" if hint.startswith("known:") and len(known) > 30 else hint
