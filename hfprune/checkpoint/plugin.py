"""The steps by which plain `from_pretrained` rebuilds a pruned transformers or wrapped timm model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from hfprune.checkpoint.configs import config_values, dense_values, set_config
from hfprune.checkpoint.expansion import forget_expanders
from hfprune.checkpoint.foreign import Foreign, legacy_tensors
from hfprune.checkpoint.internals import as_loaded, find_ties_again, forgivable, joined
from hfprune.checkpoint.metadata import BLOCK, adopt, as_dense, check_block, masked_parameters
from hfprune.checkpoint.rebuild import Rebuild, Shape, fitted
from hfprune.checkpoint.tensors import check_sparse, encodings, header
from hfprune.errors import CheckpointError
from hfprune.masks import MaskSet
from hfprune.structure.plan import Plan


def dense_config(config: Any) -> Any:
    """Puts the dense model's values into a config, in place: the skeleton is built from them."""
    dense_values(config, _plan(config))
    return config


def _plan(config: Any) -> Plan:
    block = getattr(config, BLOCK, None)
    if block is None:
        raise CheckpointError(f"config.json names hfprune as its method, but holds no block '{BLOCK}'")
    plan = check_block(block, "config.json").get("plan")
    return Plan.from_dict({} if plan is None else plan)


def is_exact(model: Any) -> bool:
    """Whether a model is of the class that its checkpoint was saved from, and not only shares its backbone."""
    return type(model).__name__ in (model.config.architectures or [type(model).__name__])


def cuts_itself(model: Any) -> bool:
    """Whether the model's class is one that `remote_code` wrote: it needs no help."""
    return getattr(type(model), "hfprune_cuts_itself", False) is True


def prepare(model: Any, checkpoint_files: Iterable[str] | None) -> Rebuild | None:
    """Cuts a skeleton to the sizes of the checkpoint's tensors.

    Raises:
        CheckpointError: plan, tensors and model do not fit together.
    """
    if cuts_itself(model):
        return None
    if not checkpoint_files or not all(str(path).endswith(".safetensors") for path in checkpoint_files):
        raise CheckpointError("a pruned model is loaded from safetensors files, whose headers say its sizes")
    plan = _plan(model.config)
    if config_values(model.config, plan.config) != (plan.dense_config or {}):
        raise CheckpointError("this version of transformers is too old to load a pruned model")
    tensors = {name: shape for path in checkpoint_files for name, shape in header(Path(path)).items()}
    return cut(model, plan, tensors)


def check_stored(model: Any, checkpoint_files: Iterable[str] | None) -> None:
    """Looks at sparse files before anything of them is loaded.

    Raises:
        CheckpointError: the format is newer than this version reads, or the parts of a tensor do not belong together.
    """
    if (block := getattr(model.config, BLOCK, None)) is not None:
        check_block(block, "config.json")
    for path in checkpoint_files or ():
        if str(path).endswith(".safetensors"):
            _refuse_joined(model, encodings(Path(path)))
            check_sparse(Path(path))


def _refuse_joined(model: Any, names: Iterable[str]) -> None:
    """Sparse tensors are expanded where they stand alone; transformers has no way to expand and join them at once."""
    if found := joined(model, names):
        raise CheckpointError(
            f"'{found[0]}' is stored sparse, and {type(model).__name__} joins it with others: "
            "`hfprune convert FOLDER OUTPUT --to dense` writes what can be loaded"
        )


def check_legacy(model: Any, checkpoint_files: Iterable[str] | None) -> Foreign:
    """The sparse tensors that compressed-tensors wrote to these files, looked at before anything is loaded.

    Raises:
        CheckpointError: there are no safetensors files, or the parts of a tensor do not belong together.
    """
    if not checkpoint_files or not all(str(path).endswith(".safetensors") for path in checkpoint_files):
        raise CheckpointError("a checkpoint of compressed-tensors is loaded from safetensors files")
    paths = [Path(path) for path in checkpoint_files]
    found = legacy_tensors(paths[0].parent, {name: path for path in paths for name in header(path)})
    _refuse_joined(model, found.parts)
    found.check()
    return found


def cut(model: Any, plan: Plan, tensors: dict[str, Shape]) -> Rebuild:
    """Drops blocks and resizes tensors of a dense skeleton.

    Args:
        model: the skeleton.
        plan: what was done.
        tensors: name → shape, as in the checkpoint's files.

    Raises:
        CheckpointError: plan, tensors and model do not fit together.
    """
    exact = is_exact(model)
    rebuild = Rebuild(model, fitted(plan, model, model.base_model_prefix, exact))
    rebuild.drop()
    if plan.dropped:
        find_ties_again(model)
    rebuild.factor()
    values, unexpected = as_loaded(model, {n: torch.empty(shape, device="meta") for n, shape in tensors.items()})
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    for target, source in model.all_tied_weights_keys.items():
        for name, twin in ((target, source), (source, target)):
            if twin in shapes:
                shapes.setdefault(name, shapes[twin])
    missing, unexpected = forgivable(model, model.state_dict().keys() - shapes.keys(), unexpected)
    if exact and (missing or unexpected):
        what, name = ("lacks", min(missing)) if missing else ("holds an unknown", min(unexpected))
        raise CheckpointError(f"the checkpoint {what} '{name}': it does not fit {type(model).__name__}")
    for name in _new_heads(model, shapes):
        del shapes[name]
    rebuild.resize(shapes)
    return rebuild


def _new_heads(model: Any, shapes: dict[str, Shape]) -> set[str]:
    """Tensors of a head that was asked for with another number of classes than the file's.

    They keep the size that was asked for, and transformers then says that they do not fit, or draws them anew where
    `ignore_mismatched_sizes` allows it.
    """
    if not isinstance(getattr(model, model.base_model_prefix, None), torch.nn.Module):
        return set()
    prefix = f"{model.base_model_prefix}."
    # timm's classifier lies inside what transformers calls the backbone.
    inner = getattr(model, "timm_model", None)
    names = getattr(inner, "pretrained_cfg", {}).get("classifier", ()) if inner is not None else ()
    heads = tuple(f"{prefix}{name}." for name in ([names] if isinstance(names, str) else names))
    wanted = model.config.num_labels
    return {
        name
        for name, value in model.state_dict().items()
        if name in shapes
        and (name.startswith(heads) or not name.startswith(prefix))
        and value.ndim
        and value.shape[0] == wanted != shapes[name][0]
    }


def finish(model: Any, rebuild: Rebuild | None, imported: Foreign | None = None) -> None:
    """Sets what tensors don't say, once they are loaded: transformers computes buffers from the dense model's facts."""
    forget_expanders(model)
    if imported is not None and not any(parameter.is_meta for parameter in model.parameters()):
        names = masked_parameters(model, set(imported.parts))
        adopt(model, imported.origin, MaskSet.from_zeros(model, names, imported.pattern))
    if isinstance(block := getattr(model.config, BLOCK, None), dict):
        setattr(model.config, BLOCK, as_dense(block))
    if rebuild is None:
        return
    rebuild.finish()
    set_config(model.config, _plan(model.config).config)
