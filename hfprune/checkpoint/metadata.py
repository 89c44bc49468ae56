"""The hfprune block of config.json: the sparsity of every masked tensor, and what was done. Data, never code."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hfprune
from hfprune.bits import mask_hash
from hfprune.config import PruningConfig
from hfprune.errors import CheckpointError
from hfprune.lowrank.factor import factored_ranks
from hfprune.masks import MaskSet
from hfprune.structure.plan import Plan

BLOCK = "hfprune"
"""The block's key in config.json, and the attribute of a model's config."""

MARKER = {"quant_method": "hfprune"}
"""The `quantization_config` by which transformers knows that hfprune must load a checkpoint."""

FORMAT_VERSION = 3
"""Format 2 is 1 with tensors stored sparse, which the block names in `encodings`; 3 is 2 with factored layers, which
the plan names. The lowest that says all is written."""


def build_block(
    model: nn.Module,
    config: PruningConfig,
    masks: MaskSet,
    achieved: float,
    base_model: str | None = None,
    plan: Plan | None = None,
) -> dict[str, Any]:
    """The block for a pruned model.

    Args:
        model: the model that the masks are applied to, or that is smaller now.
        config: what was asked for.
        masks: what is held at zero; may be empty.
        achieved: the fraction that is gone, of what the target measures; the block says what is left of anything but
            units, as the target does.
        base_model: the Hub name of the dense model, where there is one.
        plan: what is gone from the structure; by default what the model's block says already.
    """
    plan = plan_of(model) if plan is None else plan
    schedule = config.schedule.model_dump(mode="json", exclude_none=True)
    if config.is_structural:
        kind, target = config.target.kind, config.target.model_dump(mode="json", exclude_defaults=True)
    else:
        kind, target = "ratio", {"ratio": config.ratio}
    done = {
        "criterion": config.criterion,
        "granularity": config.granularity,
        "scope": config.scope,
        "schedule": schedule,
        "target": target,
        "reached": {kind: achieved if kind == "ratio" else 1 - achieved},
    }
    if base_model:
        done["base_model"] = base_model
    block = {
        "format_version": 1,
        "version": hfprune.__version__,
        "pruning": done,
        "sparsity": tensor_records(model, masks),
    }
    return block if plan is None else with_format(block | {"plan": plan.to_dict()})


def with_format(block: dict[str, Any]) -> dict[str, Any]:
    """The block with the lowest format version that says all of it."""
    version = 3 if (block.get("plan") or {}).get("factored") else 2 if "encodings" in block else 1
    return block | {"format_version": version}


def tensor_records(model: nn.Module, masks: MaskSet) -> dict[str, dict[str, Any]]:
    """The sparsity of every masked tensor under the name that it has in the checkpoint.

    transformers renames, splits and joins tensors while saving; a map of where the zeros are takes the same way.
    """
    if not len(masks):
        return {}
    names = {name for name, _ in model.named_parameters()}
    zeros: dict[str, torch.Tensor] = {}
    # A module may add things of its own to its state that are no tensors.
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    for name in masks:
        if name not in names:
            raise CheckpointError(f"a mask is held for '{name}', which the model does not have")
        zeros[name] = state[name].detach() == 0
    flags = {
        name: zeros.get(name, torch.zeros((), dtype=torch.bool).expand(value.shape)) for name, value in state.items()
    }
    flags = _as_saved(model, flags, masked=set(zeros))
    return {name: record(flag, masks.pattern) for name, flag in sorted(flags.items())}


def record(zeros: torch.Tensor, pattern: str) -> dict[str, Any]:
    """What the block says of a tensor: `zeros` says where it equals zero."""
    count = int(torch.count_nonzero(zeros))
    return {"zeros": count, "numel": zeros.numel(), "pattern": pattern, "sha256": mask_hash(zeros)}


def imported_block(origin: str, sparsity: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The block of a model that another tool has pruned."""
    return {
        "format_version": 1,
        "version": hfprune.__version__,
        "pruning": {"imported_from": origin},
        "sparsity": sparsity,
    }


def _as_saved(model: nn.Module, flags: dict[str, torch.Tensor], masked: set[str]) -> dict[str, torch.Tensor]:
    """The flags of masked tensors, named and shaped as `save_pretrained` writes the tensors."""
    # A tensor is known again by its memory where it was only renamed, by its zeros where it was joined with others.
    places = {flags[name].data_ptr() for name in masked}
    saved = saved_tensors(model, flags)
    return {
        name: flag for name, flag in saved.items() if flag.data_ptr() in places or (flag.ndim > 1 and bool(flag.any()))
    }


def saved_tensors(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with the names and shapes that `save_pretrained` gives it: the one use of transformers' renaming."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return tensors
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, tensors)


def masked_parameters(model: nn.Module, recorded: set[str]) -> list[str]:
    """The model's names of the parameters that a block records under the checkpoint's names."""
    state = model.state_dict()
    places: dict[int, set[str]] = {}  # a tied parameter has several names
    for name, value in saved_tensors(model, state).items():
        places.setdefault(value.data_ptr(), set()).add(name)
    renamed = {name: places.get(parameter.data_ptr(), set()) for name, parameter in model.named_parameters()}
    found = [name for name, saved in renamed.items() if saved & recorded]
    if recorded - set().union(*renamed.values()):
        # What was split or joined while saving has no name of its own there: its zeros say that it is masked.
        found += [name for name, saved in renamed.items() if not saved and bool((state[name] == 0).any())]
    return found


def masks_from_block(model: nn.Module, block: dict[str, Any]) -> MaskSet:
    """The masks of a model loaded from a pruned checkpoint: its zeros, in the tensors that the block records."""
    records = block.get("sparsity", {})
    patterns = {record["pattern"] for record in records.values()}
    pattern = patterns.pop() if len(patterns) == 1 else "unstructured"
    return MaskSet.from_zeros(model, masked_parameters(model, set(records)), pattern)


def adopt(model: nn.Module, origin: str, masks: MaskSet) -> None:
    """Records in a model what another tool has pruned, beside what its block says already.

    Args:
        model: with the pruned weights.
        origin: the tool.
        masks: what it holds at zero.
    """
    block = block_of(model)
    if block is None:
        block = imported_block(origin, {})
    else:
        masks = MaskSet({**masks_from_block(model, block).kept, **masks.kept}, masks.pattern)
    block["sparsity"] = tensor_records(model, masks)
    setattr(model.config if _has_config(model) else model, BLOCK, block)


def annotate(
    model: nn.Module,
    config: PruningConfig,
    masks: MaskSet,
    achieved: float,
    base_model: str | None = None,
    plan: Plan | None = None,
) -> dict[str, Any]:
    """Puts the block where saving finds it: into a transformers model's config, into others as an attribute.

    With a plan, the config of a transformers model gets the small model's values too, and says whether the model
    needs hfprune to load; so transformers' own `save_pretrained` writes a checkpoint that loads again.
    """
    if plan is not None and (before := plan_of(model)) is not None:
        # The config says the smaller values already; what the dense model had stands in the block alone.
        from hfprune.checkpoint.configs import config_values

        dense = before.dense_config
        if dense is not None:
            new = plan.config.keys() - before.config.keys()
            dense = (plan.dense_config or config_values(model.config, new)) | dense
        plan = replace(plan, config=before.config | plan.config, dense_config=dense)
    if plan is not None:  # what is factored may have been merged again: the model itself says it
        plan = replace(plan, factored=factored_ranks(model, plan))
    block = build_block(model, config, masks, achieved, base_model, plan)
    setattr(model.config if _has_config(model) else model, BLOCK, block)
    if "plan" in block:
        # Needed for smaller models alone, and slow to import.
        from hfprune.checkpoint.uniform import choose_route

        choose_route(model)
    return block


def refresh(model: nn.Module, masks: MaskSet) -> None:
    """Counts the zeros of an annotated model anew, just before it is saved."""
    if block := block_of(model):
        block["sparsity"] = tensor_records(model, masks)


def block_of(model: nn.Module) -> dict[str, Any] | None:
    """The block that a model carries, if it has been pruned."""
    return getattr(model.config if _has_config(model) else model, BLOCK, None)


def plan_of(model: nn.Module) -> Plan | None:
    """The plan that a model carries, if anything is gone from its structure."""
    plan = (block_of(model) or {}).get("plan")
    return None if plan is None else Plan.from_dict(plan)


def is_timm(model: nn.Module) -> bool:
    """Whether the module was made by `timm.create_model`."""
    return type(model).__module__.startswith("timm.") and isinstance(getattr(model, "pretrained_cfg", None), dict)


def _has_config(model: nn.Module) -> bool:
    return hasattr(getattr(model, "config", None), "save_pretrained")


def read_config(folder: str | Path) -> dict[str, Any]:
    """The values of a checkpoint's config.json.

    Raises:
        CheckpointError: it is not there, or can't be read.
    """
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


def read_block(folder: str | Path) -> dict[str, Any] | None:
    """The block of a checkpoint folder, or None where its config.json has none.

    Raises:
        CheckpointError: there is no config.json, it can't be read, or its format is newer than this version reads.
    """
    block = read_config(folder).get(BLOCK)
    return None if block is None else check_block(block, str(Path(folder) / "config.json"))


def as_dense(block: dict[str, Any]) -> dict[str, Any]:
    """The block without what it says of sparse files: that of a model in memory, and of dense files."""
    if "encodings" not in block:
        return block
    return with_format({key: value for key, value in block.items() if key != "encodings"})


def check_block(block: Any, path: str) -> dict[str, Any]:
    """The block, if it is one that this version reads.

    Raises:
        CheckpointError: it is malformed, or its format is newer.
    """
    version = block.get("format_version") if isinstance(block, dict) else None
    if type(version) is not int:
        raise CheckpointError(f"{path}: the block '{BLOCK}' has no format_version")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: written in format {version}, and this version reads up to {FORMAT_VERSION}; upgrade hfprune"
        )
    records = block.get("sparsity", {})
    if not isinstance(records, dict):
        raise CheckpointError(f"{path}: the block '{BLOCK}' has a malformed sparsity: {records!r:.80}")
    for name, record in records.items():
        if not _is_record(record):
            raise CheckpointError(f"{path}: the block '{BLOCK}' has a malformed record of '{name}': {record!r:.80}")
    if block.get("plan") is not None:
        try:
            Plan.from_dict(block["plan"])
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
    return block


def _is_record(record: Any) -> bool:
    kinds = {"zeros": int, "numel": int, "pattern": str, "sha256": str}
    return isinstance(record, dict) and all(type(record.get(key)) is kind for key, kind in kinds.items())
