"""Cutting tensors: parameters, gradients and buffers by index, with a journal that takes everything back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from hfprune.structure.groups import Structure


class Journal:
    """What was changed, so that it can be undone in reverse order."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def set_entry(self, entries: dict[str, Any], key: str, value: Any) -> None:
        """`entries[key] = value`, undoable."""
        before = entries[key]
        self._undo.append(lambda: entries.__setitem__(key, before))
        entries[key] = value

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """`owner.name = value`, undoable."""
        before = getattr(owner, name)
        self._undo.append(lambda: setattr(owner, name, before))
        setattr(owner, name, value)

    def add(self, undo: Callable[[], None]) -> None:
        """Any other step, by what undoes it."""
        self._undo.append(undo)

    def rollback(self) -> None:
        """Everything as it was."""
        while self._undo:
            self._undo.pop()()


def kept_indices(structure: Structure, gone: np.ndarray) -> dict[str, dict[int, torch.Tensor]]:
    """Tensor name to dimension to the indices that stay, for every dimension that loses something."""
    kept: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    for member in structure.walk.members:
        own = slice(member.first, member.first + member.size)
        stays = ~gone[own][~structure.already[own]]
        if not stays.all():
            kept[member.name][member.dim] = torch.from_numpy(np.flatnonzero(stays))
    return dict(kept)


def cut(model: nn.Module, kept: dict[str, dict[int, torch.Tensor]], journal: Journal) -> None:
    """Cuts tensors in place; tied ones stay tied, gradients and `requires_grad` go along.

    Args:
        model: the module.
        kept: tensor name to dimension to the indices that stay.
        journal: takes note.
    """
    owners: dict[int, list[tuple[dict[str, Any], str]]] = defaultdict(list)
    named: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        for entries in (module._parameters, module._buffers):
            for leaf, tensor in entries.items():
                if tensor is not None:
                    owners[id(tensor)].append((entries, leaf))
                    named.setdefault(f"{path}.{leaf}" if path else leaf, tensor)
    for name, dims in kept.items():
        tensor = named[name]
        smaller = sliced(tensor.detach(), dims)
        if isinstance(tensor, nn.Parameter):
            smaller = nn.Parameter(smaller, requires_grad=tensor.requires_grad)
            if tensor.grad is not None:
                smaller.grad = sliced(tensor.grad, dims)
        for entries, leaf in owners[id(tensor)]:
            journal.set_entry(entries, leaf, smaller)


def sliced(tensor: torch.Tensor, dims: dict[int, torch.Tensor]) -> torch.Tensor:
    """What stays of a tensor: dimension to the indices that do."""
    if dims.keys() == {0, 1}:  # in one go: nothing lies between what is kept in memory
        return tensor[dims[0].to(tensor.device)[:, None], dims[1].to(tensor.device)]
    for dim, indices in dims.items():
        tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor
