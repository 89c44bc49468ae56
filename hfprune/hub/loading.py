"""How a checkpoint is loaded: the library, and the very lines, as its files ask for them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from hfprune.checkpoint.metadata import MARKER
from hfprune.checkpoint.remote_code import auto_classes
from hfprune.errors import CheckpointError

Kind = Literal["transformers", "timm", "module"]
_TIMM_ALONE = "timm_wrapper"


def kind_of(folder: str | Path) -> Kind:
    """Which library loads the checkpoint in a folder; `module` is the user's own class.

    Raises:
        CheckpointError: the folder holds no config.json that can be read.
    """
    config = _config(folder)
    if "model_type" in config:
        return "timm" if config["model_type"] == _TIMM_ALONE else "transformers"
    return "timm" if "architecture" in config else "module"


def architecture(folder: str | Path) -> str | None:
    """The name of the class that was saved, or timm's name of the architecture.

    Raises:
        CheckpointError: the folder holds no config.json that can be read.
    """
    config = _config(folder)
    if "architecture" in config:
        return config["architecture"]
    return (config.get("architectures") or [""])[0].rpartition(":")[2] or None


def loading_lines(folder: str | Path, source: str | None = None, maker: Mapping[str, str] | None = None) -> str:
    """Python lines that load the checkpoint in a folder, with all that it needs and nothing else.

    Args:
        folder: the checkpoint.
        source: the path that they load from; by default the folder's name.
        maker: for an own module: `import`, as `package.module:name`, and `call`, the expression that makes the dense
            module; by default the class that config.json names, without arguments.

    Raises:
        CheckpointError: the folder holds no config.json that can be read.
    """
    folder = Path(folder)
    source = source or folder.resolve().name
    config = _config(folder)
    if "model_type" in config:
        return _transformers_lines(config, folder, source)
    if "architecture" in config:
        return f"import timm\n\nmodel = {_timm_call(source)}"
    return _module_lines(config, source, maker)


def loads_from(text: str, before: str, repo_id: str) -> str:
    """A card in which the lines that load a folder load a repository on the Hub instead.

    Args:
        text: the card.
        before: the folder's name, as the lines say it.
        repo_id: the repository, as `user/name`.
    """
    text = text.replace(f'from_pretrained("{before}"', f'from_pretrained("{repo_id}"')
    return text.replace(f'"local-dir:{before}"', f'"hf-hub:{repo_id}"')


def _config(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"'{folder}' is not a checkpoint: it holds no config.json") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} can't be read: it holds no map")
    return values


def _transformers_lines(config: Mapping[str, Any], folder: Path, source: str) -> str:
    auto = _auto_class(config)
    names = [auto, *_companions(folder)]
    imported = f"from transformers import {', '.join(sorted(set(names)))}"
    others = "".join(f'\n{_variable(name)} = {name}.from_pretrained("{source}")' for name in names[1:])
    plain = f'model = {auto}.from_pretrained("{source}")'
    hooked = (config.get("quantization_config") or {}).get("quant_method") == MARKER["quant_method"]
    if hooked and auto in (config.get("auto_map") or {}):
        trusted = f'model = {auto}.from_pretrained("{source}", trust_remote_code=True)'
        with_hfprune = f"# or with hfprune, and no code of the checkpoint\nimport hfprune\n\n{plain}"
        return f"{imported}\n\n{trusted}{others}\n\n{with_hfprune}"
    if hooked:
        return f"# hfprune gives transformers the loader\nimport hfprune\n{imported}\n\n{plain}{others}"
    if config["model_type"] == _TIMM_ALONE:
        return f"{imported}\n\n{plain}{others}\n\n# or with timm alone\nimport timm\n\nmodel = {_timm_call(source)}"
    return f"{imported}\n\n{plain}{others}"


def _auto_class(config: Mapping[str, Any]) -> str:
    """The auto class that loads the saved class with its head; the class itself where there is none."""
    name = (config.get("architectures") or ["AutoModel"])[0]
    found = [auto for auto in auto_classes(config["model_type"], name) if auto != "AutoModelForPreTraining"]
    same = [auto for auto in found if auto.removeprefix("AutoModel") == re.sub(r"^.*?(?=For[A-Z]|$)", "", name)]
    return (same or found or [name])[0]


def _companions(folder: Path) -> list[str]:
    """The auto classes of what was saved beside the model."""
    beside = {"AutoTokenizer": "tokenizer_config.json", "AutoImageProcessor": "preprocessor_config.json"}
    return [name for name, file in beside.items() if (folder / file).is_file()]


def _variable(auto: str) -> str:
    return "tokenizer" if auto == "AutoTokenizer" else "processor"


def _timm_call(source: str) -> str:
    return f'timm.create_model("local-dir:{source}", pretrained=True)'


def _module_lines(config: Mapping[str, Any], source: str, maker: Mapping[str, str] | None) -> str:
    place = maker["import"] if maker else (config.get("architectures") or ["__main__:Model"])[0]
    module, _, name = place.partition(":")
    call = maker["call"] if maker else name
    imported = f"from {module} import {name.partition('.')[0]}"
    if module == "__main__" or "<locals>" in name:
        imported = f"# {name}: the model's class, from your own code"
    made = call if call == name else f"lambda: {call}"
    return f'import hfprune\n{imported}\n\nmodel = hfprune.from_pretrained("{source}", model={made})'
