"""from_pretrained(): a saved model of any kind, checked against its metadata."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hfprune.checkpoint.foreign import LEGACY, Foreign, find_foreign
from hfprune.checkpoint.metadata import BLOCK, MARKER, as_dense, is_timm, plan_of, read_block, read_config
from hfprune.checkpoint.rebuild import fitted, rebuild, unchanged_on_error
from hfprune.checkpoint.tensors import header, read_all, tensor_files
from hfprune.checkpoint.verify import verify
from hfprune.errors import CheckpointError, and_more
from hfprune.hub.reach import folder_of
from hfprune.structure.plan import Plan


def from_pretrained(
    folder: str | Path,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    *,
    revision: str | None = None,
    check: bool = True,
    **options: Any,
) -> nn.Module:
    """Loads what `save_pretrained` saved, after comparing it with its metadata.

    Args:
        folder: the checkpoint: a folder, or a repository on the Hub (`OWNER/NAME`).
        model: for a module that is neither transformers' nor timm's: its class, a function that makes it, or a fresh
            instance of the dense model, which is cut to size and filled. For the others it may be left out; a
            transformers class chooses the head, an instance from `timm.create_model` is filled like an own module.
        revision: a branch, tag or commit of the repository.
        check: whether to compare every recorded tensor with its record first.
        options: passed on to transformers' `from_pretrained` (`dtype`, `device_map`, ...).

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: the folder is not a checkpoint, does not match its metadata, or does not fit the model; an
            instance that was given is then as it was.
        NotReachable: there is no such repository or revision, or the Hub can't be reached.
        ConfigError: a revision of a folder on this machine.
    """
    folder = folder_of(folder, revision)
    if (foreign := find_foreign(folder)) is not None:
        return _load_foreign(foreign, model, options)
    block = read_block(folder)
    if check:
        verify(folder).raise_if_bad(folder)
    config = read_config(folder)
    if "model_type" in config and not (isinstance(model, nn.Module) and is_timm(model)):
        return _transformers_class(config, folder, model).from_pretrained(folder, **options).eval()
    if model is None:
        if "architecture" in config:
            import timm

            if block is None or block.get("plan") is None:
                return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
            model = timm.create_model(f"local-dir:{folder}", pretrained=False)
        kind = (config.get("architectures") or ["an own module"])[0]
        raise CheckpointError(f"'{folder}' holds {kind}: give its class or a fresh instance as `model`")
    module = model if isinstance(model, nn.Module) else model()
    with unchanged_on_error(module):
        plan = None if block is None or block.get("plan") is None else Plan.from_dict(block["plan"])
        # An instance that has been cut already, as when training is resumed, is only filled.
        if plan is not None and plan_of(module) != plan:
            _cut(module, plan, folder)
        _fill(module, folder)
    if block is not None:
        setattr(module, BLOCK, as_dense(block))
    return module.eval()


def _load_foreign(foreign: Foreign, model: Any, options: dict[str, Any]) -> nn.Module:
    """A transformers model that compressed-tensors stored sparse, with its masks."""
    from transformers import AutoConfig

    if foreign.origin != LEGACY:
        raise CheckpointError(
            f"'{foreign.folder}' holds masks of {foreign.origin}; `hfprune convert {foreign.folder} OUTPUT --to dense` "
            "writes what can be loaded"
        )
    config = AutoConfig.from_pretrained(foreign.folder)
    config.quantization_config = MARKER | {"storage_only": True, "legacy": True}
    kind = _transformers_class(foreign.config, foreign.folder, model)
    return kind.from_pretrained(foreign.folder, config=config, **options).eval()


def _cut(module: nn.Module, plan: Plan, folder: Path) -> None:
    """Makes a dense module as small as the checkpoint's tensors are."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(set(tensor_files(folder).values())):
        shapes |= header(path)
    try:
        rebuild(module, fitted(plan, module, "timm_model" if is_timm(module) else ""), shapes)
    except CheckpointError as error:
        raise CheckpointError(f"'{folder}' does not fit {type(module).__name__}: {error}") from error


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
    """Loads the tensors of a folder into a module; a module that they do not fit is left as it was."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(set(tensor_files(folder).values())):
        tensors |= read_all(path)
    state = module.state_dict()
    filled = {state[name].data_ptr() for name in tensors if name in state}
    wrong = [f"'{name}' is not in the model" for name in tensors if name not in state]
    wrong += [
        f"'{name}' has the shape {tuple(value.shape)}, the model's {tuple(state[name].shape)}"
        for name, value in tensors.items()
        if name in state and state[name].shape != value.shape
    ]
    # A tied tensor stands in the file under one of its names.
    wrong += [f"'{n}' is missing" for n, v in state.items() if n not in tensors and v.data_ptr() not in filled]
    if wrong:
        raise CheckpointError(f"'{folder}' does not fit {type(module).__name__}: {wrong[0]}{and_more(wrong)}")
    module.load_state_dict(tensors, strict=False)
