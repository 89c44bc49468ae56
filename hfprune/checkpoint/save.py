"""save_pretrained(): any module into a folder that loads again; picks the route by the kind of model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from hfprune.checkpoint.files import side_folder
from hfprune.checkpoint.metadata import BLOCK, block_of, is_timm, masks_from_block, plan_of, refresh
from hfprune.checkpoint.torch_prune import refuse_torch_prune
from hfprune.errors import CheckpointError, ConfigError
from hfprune.masks import MaskSet
from hfprune.offloading import onloaded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_FILES = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    masks: MaskSet | None = None,
    processing_class: Any = None,
    *,
    remote_code: bool = False,
    sparse: str | None = None,
    **options: Any,
) -> Path:
    """Saves any module as safetensors with its config and, if it was pruned, its sparsity.

    transformers models load again by `from_pretrained`, timm models by `timm.create_model("local-dir:FOLDER",
    pretrained=True)` and as `AutoModelForImageClassification`, others by `hfprune.from_pretrained(folder, model=...)`.
    Unevenly smaller models load after `import hfprune`; timm alone can't build them.
    Files are complete or not there: what was in the folder stays until the new files are whole.

    Args:
        model: what to save; it is not changed.
        folder: made where it is missing.
        masks: by default those that the model's own block and zeros say.
        processing_class: a tokenizer or image processor that is saved along.
        remote_code: whether to add a modeling file by which an uneven transformers model loads with
            `trust_remote_code=True` where hfprune is not installed. What needs no hfprune gets no file.
        sparse: `bitmask` stores every masked tensor as its values and their places (`checkpoint.bitmask`), where that
            takes less room; it then loads after `import hfprune`. By default all is dense, which loads anywhere.
        options: for transformers models, passed on to their `save_pretrained` (`max_shard_size`, ...).

    Raises:
        ModelError: the model is under torch.nn.utils.prune (`import_torch_prune`).
        ConfigError: `sparse` is anything else, or nothing of the model is held at zero.
        CheckpointError: the files could not be written; what was in the folder is unchanged.
    """
    from transformers import PreTrainedModel

    folder = Path(folder)
    if folder.is_file():
        raise CheckpointError(f"'{folder}' is a file, not a folder")
    refuse_torch_prune(model)
    if sparse not in (None, "bitmask"):
        raise ConfigError(f"sparse: {sparse!r} is no way of storing; known: bitmask")
    with onloaded(model) if block_of(model) else nullcontext():  # its zeros are looked at
        if masks is None and (block := block_of(model)):
            masks = masks_from_block(model, block)
        if masks is not None:
            refresh(model, masks)
        if isinstance(model, PreTrainedModel) and plan_of(model) is not None:
            _prepare_smaller(model)
        with side_folder(folder, replaces=WEIGHTS_FILES) as side:
            if isinstance(model, PreTrainedModel):
                _save_transformers(model, side, options, remote_code)
            elif is_timm(model):
                _save_timm(model, side, remote_code)
            else:
                _save_module(model, side)
            if sparse is not None:
                _store_sparse(model, side)
            if processing_class is not None:
                processing_class.save_pretrained(side)
    return folder


def _store_sparse(model: nn.Module, folder: Path) -> None:
    # Needed for sparse files alone.
    from transformers import PreTrainedModel

    from hfprune.checkpoint.convert import store
    from hfprune.checkpoint.internals import joined

    records = (block_of(model) or {}).get("sparsity")
    if not records:
        raise ConfigError("sparse: nothing of the model is held at zero, so nothing can be stored sparse")
    # What loading joins or splits can't be expanded at the same time.
    store(folder, folder, sparse=True, but=joined(model, records) if isinstance(model, PreTrainedModel) else ())


def _save_transformers(model: PreTrainedModel, folder: Path, options: dict[str, Any], remote_code: bool) -> None:
    from transformers import TimmWrapperForImageClassification

    if isinstance(model, TimmWrapperForImageClassification):
        # transformers refuses tensors that a wrapped model shares, of which it knows nothing; timm asks for every name.
        options = options | {"state_dict": unshared(options.get("state_dict") or model.state_dict())}
    model.save_pretrained(folder, **options)
    if remote_code and plan_of(model) is not None:
        _add_remote_code(model, folder)


def unshared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, contiguous and without shared memory, as safetensors wants them."""
    seen: set[int] = set()
    result = {}
    for name, value in tensors.items():
        shared = value.data_ptr() in seen
        seen.add(value.data_ptr())
        result[name] = value.clone() if shared else value.contiguous()
    return result


def _prepare_smaller(model: nn.Module) -> None:
    """Chooses the way by which a smaller transformers model loads again, and goes it once with shapes alone."""
    # Needed for smaller models alone, and slow to import.
    from hfprune.checkpoint.uniform import check_loads, choose_route

    choose_route(model)
    check_loads(model)


def _add_remote_code(model: Any, folder: Path) -> None:
    # Uniform models load without, and are not marked.
    if getattr(model.config, "quantization_config", None) is not None:
        from hfprune.checkpoint.remote_code import add_remote_code

        add_remote_code(model, folder)


def _save_timm(model: nn.Module, folder: Path, remote_code: bool) -> None:
    # timm is slow to import, and only its own models need it.
    from hfprune.checkpoint.timm import wrap_timm

    wrapper = wrap_timm(model)
    if block := block_of(model):
        setattr(wrapper.config, BLOCK, block)
    if plan_of(wrapper) is not None:
        _prepare_smaller(wrapper)
    _save_transformers(wrapper, folder, {}, remote_code)


def _save_module(model: nn.Module, folder: Path) -> None:
    tensors: dict[int | str, tuple[str, torch.Tensor]] = {}
    for name, value in model.state_dict().items():  # a tied tensor once, under its first name, as masks know it
        tensors.setdefault(value.data_ptr() if value.numel() else name, (name, value))
    save_file({n: v.contiguous() for n, v in tensors.values()}, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    kind = type(model)
    config: dict[str, Any] = {"architectures": [f"{kind.__module__}:{kind.__qualname__}"]}
    if block := block_of(model):
        config[BLOCK] = block
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
