"""from_pretrained(): a saved model of any kind, checked against its metadata."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_model
from torch import nn

from hfprune.checkpoint.metadata import BLOCK, read_block
from hfprune.checkpoint.verify import tensor_files, verify
from hfprune.errors import CheckpointError


def from_pretrained(
    folder: str | Path, model: nn.Module | Callable[[], nn.Module] | None = None, *, check: bool = True, **options: Any
) -> nn.Module:
    """Loads what `save_pretrained` saved, after comparing it with its metadata.

    Args:
        folder: the checkpoint.
        model: for a module that is neither transformers' nor timm's: its class, a function that makes it, or a fresh
            instance, which is filled. For the others it may be left out; a transformers class chooses the head.
        check: whether to compare every recorded tensor with its record first.
        options: passed on to transformers' `from_pretrained` (`dtype`, `device_map`, ...).

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: the folder is not a checkpoint, does not match its metadata, or does not fit the model.
    """
    folder = Path(folder)
    block = read_block(folder)
    if check:
        verify(folder).raise_if_bad(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "model_type" in config:
        return _transformers_class(config, folder, model).from_pretrained(folder, **options).eval()
    if model is None:
        if "architecture" in config:
            import timm

            return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        kind = (config.get("architectures") or ["an own module"])[0]
        raise CheckpointError(f"'{folder}' holds {kind}: give its class or a fresh instance as `model`")
    module = model if isinstance(model, nn.Module) else model()
    _fill(module, folder)
    if block is not None:
        setattr(module, BLOCK, block)
    return module.eval()


def _transformers_class(config: dict[str, Any], folder: Path, model: Any) -> Any:
    """The class to load with: the one given, else the one that the config names."""
    import transformers

    if isinstance(model, type) and hasattr(model, "from_pretrained"):
        return model
    name = (config.get("architectures") or [""])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise CheckpointError(
            f"'{folder}': its config names the architecture '{name}', which transformers does not have"
        )
    return kind


def _fill(module: nn.Module, folder: Path) -> None:
    (path,) = set(tensor_files(folder).values())
    try:
        load_model(module, str(path), strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"'{folder}' does not fit {type(module).__name__}: {reason[:300]}") from error
