"""How a checkpoint is loaded: the library, and the very lines, as its config.json asks for them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from hfprune.checkpoint.metadata import MARKER
from hfprune.checkpoint.remote_code import auto_classes

Kind = Literal["transformers", "timm", "module"]
_TIMM = "timm_wrapper"
_COMPANIONS = {
    "tokenizer_config.json": ("tokenizer", "AutoTokenizer"),
    "preprocessor_config.json": ("processor", "AutoImageProcessor"),
    "processor_config.json": ("processor", "AutoProcessor"),
}
_WHOLE = "processor_config.json"
"""Of a processor that holds the tokenizer too."""


def kind_of(config: Mapping[str, Any]) -> Kind:
    """Which library loads a checkpoint with this config.json; `module` is the user's own class."""
    if "model_type" in config:
        return "timm" if config["model_type"] == _TIMM else "transformers"
    return "timm" if "architecture" in config else "module"


def architecture(config: Mapping[str, Any]) -> str | None:
    """timm's name of the architecture, else that of the class that was saved."""
    return config.get("architecture") or (config.get("architectures") or [""])[0].rpartition(":")[2] or None


def loading_lines(
    config: Mapping[str, Any],
    source: str,
    *,
    on_hub: bool = False,
    revision: str | None = None,
    beside: Collection[str] = (),
    maker: Mapping[str, str] | None = None,
) -> str:
    """Python lines that load a checkpoint, with all that it needs and nothing else.

    Args:
        config: the values of its config.json.
        source: the folder or, `on_hub`, the repository that the lines load from.
        revision: of the repository.
        beside: the names of its other files: a tokenizer or a processor among them is loaded too.
        maker: for an own module: `import`, as `package.module:name`, and `call`, the expression that makes the dense
            module; by default the class that config.json names, without arguments.
    """
    place = json.dumps(source) + (f", revision={json.dumps(revision)}" if revision else "")
    address = f"hf-hub:{source}{f'@{revision}' if revision else ''}" if on_hub else f"local-dir:{source}"
    timm = f"import timm\n\nmodel = timm.create_model({json.dumps(address)}, pretrained=True)"
    if "model_type" not in config:
        return timm if "architecture" in config else _module_lines(config, place, maker)
    auto = _auto_class(config)
    whole = [file for file in beside if file == _WHOLE]
    others = [known for file, known in _COMPANIONS.items() if file in (whole or beside)]
    imported = f"from transformers import {', '.join(sorted([auto, *(name for _, name in others)]))}"
    said = "".join(f"\n{variable} = {name}.from_pretrained({place})" for variable, name in others)
    plain = f"model = {auto}.from_pretrained({place})"
    if (config.get("quantization_config") or {}).get("quant_method") != MARKER["quant_method"]:
        alone = f"\n\n# or with timm alone\n{timm}" if config["model_type"] == _TIMM else ""
        return f"{imported}\n\n{plain}{said}{alone}"
    if auto not in (config.get("auto_map") or {}):
        return f"# hfprune gives transformers the loader\nimport hfprune\n{imported}\n\n{plain}{said}"
    trusted = f"{plain.removesuffix(')')}, trust_remote_code=True)"
    return (
        f"{imported}\n\n{trusted}{said}\n\n# or with hfprune, and no code of the checkpoint\nimport hfprune\n\n{plain}"
    )


def _auto_class(config: Mapping[str, Any]) -> str:
    """The auto class that loads the saved class with its head; the class itself where there is none."""
    name = (config.get("architectures") or ["AutoModel"])[0]
    found = [auto for auto in auto_classes(config["model_type"], name) if auto != "AutoModelForPreTraining"]
    head = re.search(r"For[A-Z]\w*$", name)
    same = [auto for auto in found if head and auto == f"AutoModel{head[0]}"]
    return (same or found or [name])[0]


def _module_lines(config: Mapping[str, Any], place: str, maker: Mapping[str, str] | None) -> str:
    said = maker["import"] if maker else (config.get("architectures") or ["__main__:Model"])[0]
    module, _, name = said.partition(":")
    call = maker["call"] if maker else name
    imported = f"from {module} import {name.partition('.')[0]}"
    if module == "__main__" or "<locals>" in name:
        imported = f"# {name}: the model's class, from your own code"
    made = call if call == name else f"lambda: {call}"
    return f"import hfprune\n{imported}\n\nmodel = hfprune.from_pretrained({place}, model={made})"
