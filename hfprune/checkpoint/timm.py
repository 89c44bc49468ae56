"""timm modules: wrapped so that timm and transformers both read what is saved."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from timm.models._hub import save_config_for_hf
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification
from transformers.conversion_mapping import get_model_conversion_mapping

from hfprune.errors import ModelError


def timm_wrapper_config(module: nn.Module, labels: list[str] | None = None) -> TimmWrapperConfig:
    """The transformers config of a timm module, with all that both libraries need to build it again.

    Args:
        module: made by `timm.create_model`.
        labels: the names of its classes; by default `LABEL_0`, `LABEL_1`, ...

    Raises:
        ModelError: the module was not made by `timm.create_model`, or has no classifier.
    """
    if not isinstance(getattr(module, "pretrained_cfg", None), dict) or not hasattr(module, "_model_args"):
        raise ModelError(f"{type(module).__name__} was not made by timm.create_model: timm can't say how to build it")
    if not module.num_classes:
        raise ModelError(f"{type(module).__name__} has no classifier; give timm.create_model num_classes")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        try:
            save_config_for_hf(module, str(path))
        except ValueError as error:
            raise ModelError(f"{type(module).__name__} can't be written down: {error}") from error
        values = json.loads(path.read_text(encoding="utf-8"))
    # The number of classes stands at the top: inside model_args transformers' wrapper would get it twice.
    model_args = {key: value for key, value in values.get("model_args", {}).items() if key != "num_classes"}
    labels = labels or [f"LABEL_{i}" for i in range(module.num_classes)]
    return TimmWrapperConfig(
        architecture=values["architecture"],
        model_args=model_args,
        pretrained_cfg=values["pretrained_cfg"],
        num_features=values["num_features"],
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        problem_type="single_label_classification",
        **({"global_pool": values["global_pool"]} if "global_pool" in values else {}),
    )


def wrap_timm(module: nn.Module, labels: list[str] | None = None) -> TimmWrapperForImageClassification:
    """A timm module as transformers' Trainer and `from_pretrained` want it, around the same parameters.

    Args:
        module: made by `timm.create_model`; it becomes the wrapper's `timm_model` as it is.
        labels: the names of its classes.

    Raises:
        ModelError: the module was not made by `timm.create_model`, or has no classifier.
    """
    config = timm_wrapper_config(module, labels)
    if len(config.id2label) != module.num_classes:
        raise ModelError(f"the model has {module.num_classes} classes, but there are {len(config.id2label)} labels")
    # The wrapper's constructor builds a model of its own and draws its weights anew by transformers' rules: on the
    # meta device neither costs anything, and timm's own weights take its place.
    with torch.device("meta"):
        wrapper = TimmWrapperForImageClassification(config)
    wrapper.timm_model = module
    wrapper.training = module.training
    # As if loaded from timm's own file: saving then writes timm's tensor names, which both libraries read.
    wrapper._weight_conversions = get_model_conversion_mapping(wrapper, add_legacy=False)
    return wrapper
