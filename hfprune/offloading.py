"""Models that accelerate has spread out: parameters that wait in the CPU's memory are pruned there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hfprune.errors import ModelError

WAY_OUT = "prune the checkpoint with `hfprune prune --stream` (hfprune.prune_checkpoint), or load the model whole"


def is_offloaded(model: nn.Module) -> bool:
    """Whether parameters of a model are elsewhere while it does not run (`device_map="auto"`, `cpu_offload`)."""
    return any(True for _ in _offloaded(model))


def refuse_offloaded(model: nn.Module, why: str) -> None:
    """Refuses what needs the parameters where the model has them.

    Raises:
        ModelError: some of them are elsewhere.
    """
    if is_offloaded(model):
        raise ModelError(f"parts of {type(model).__name__} are offloaded, and {why}; {WAY_OUT}")


@contextmanager
def onloaded(model: nn.Module) -> Iterator[None]:
    """Parameters and buffers that wait in the CPU's memory are the model's own for the time of the block.

    They are the same tensors, not copies: what is changed in them stays changed. The model can't run meanwhile.

    Raises:
        ModelError: some lie on the disk.
    """
    places, known = [], {}
    for module, name, values in _offloaded(model):
        if not _in_memory(values, name):
            raise ModelError(f"parts of {type(model).__name__} are offloaded to the disk; {WAY_OUT}")
        owner, _, leaf = name.rpartition(".")
        holder = module.get_submodule(owner)
        places.append((holder._parameters if leaf in holder._parameters else holder._buffers, leaf, values[name]))
    before = [(entries, leaf, entries[leaf]) for entries, leaf, _ in places]
    try:
        for entries, leaf, value in places:
            if isinstance(entries[leaf], nn.Parameter):  # tied ones are one again
                like = entries[leaf].requires_grad and value.is_floating_point()
                value = known.setdefault((value.data_ptr(), value.shape), nn.Parameter(value, requires_grad=like))
            entries[leaf] = value
        yield
    finally:
        for entries, leaf, value in before:
            entries[leaf] = value


def _offloaded(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """What accelerate's hooks hold: the module, a tensor's name in it, and a map that has its value."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):  # several of them in a row
            if not getattr(one, "offload", False) or one.weights_map is None:
                continue
            for name, tensor in _tensors(module, one.place_submodules):
                if tensor.is_meta:
                    yield module, name, one.weights_map


def _tensors(module: nn.Module, recurse: bool) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=recurse, remove_duplicate=False)
    yield from module.named_buffers(recurse=recurse, remove_duplicate=False)


def _in_memory(values: Any, name: str) -> bool:
    """Whether the value of a tensor lies in memory: in a plain map, or in the part of a loader that is one."""
    while hasattr(values, "prefix"):
        values, name = values.dataset, f"{values.prefix}{name}"
    return name in (values if isinstance(values, dict) else getattr(values, "state_dict", {}))
