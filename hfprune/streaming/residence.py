"""Residence: which parts of a model without values have them for a while; the others run on shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hfprune.criteria.stacks import mapped, tensors_in

Values = Callable[[list[str]], dict[str, torch.Tensor]]


class Residence:
    """Gives modules of a model on the meta device their values, and takes them away again.

    Args:
        model: its buffers that no file holds have values.
        values: from the names of some of its tensors to these.
        device: where they are to lie.
    """

    def __init__(self, model: nn.Module, values: Values, device: torch.device):
        self.model, self.values, self.device = model, values, device
        saved = model.state_dict().keys()
        self._names: dict[int, str] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name in saved:
                self._names[id(tensor)] = name
            elif not tensor.is_meta:
                owner, _, leaf = name.rpartition(".")
                model.get_submodule(owner)._buffers[leaf] = tensor.to(device)

    def names(self, modules: Iterable[nn.Module]) -> list[str]:
        """The first names of the tensors that files hold of some modules."""
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        return list(dict.fromkeys(self._names[id(tensor)] for tensor in tensors if id(tensor) in self._names))

    @contextmanager
    def at_hand(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """The modules with their values, which may be changed, for the time of the block."""
        modules = list(modules)
        before = [entry for module in modules for inner in module.modules() for entry in self._entries(inner)]
        self._give(before, own=True)
        try:
            yield
        finally:
            _put_back(before)

    @contextmanager
    def on_demand(self) -> Iterator[None]:
        """Every module gets its values when it runs, for as long as it runs, unless it is given shapes alone."""
        given: dict[nn.Module, list[tuple[dict[str, Any], str, torch.Tensor]]] = {}

        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if not any(tensor.is_meta for tensor in tensors_in((args, kwargs))):
                entries = self._entries(module)
                self._give(entries, own=False)
                given[module] = entries

        def leave(module: nn.Module, *_: Any) -> None:
            _put_back(given.pop(module, []))

        owners = [module for module in self.model.modules() if self._entries(module)]
        handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in owners]
        handles += [module.register_forward_hook(leave, always_call=True) for module in owners]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module in list(given):
                leave(module)

    def _entries(self, module: nn.Module) -> list[tuple[dict[str, Any], str, torch.Tensor]]:
        """Where a module holds tensors that have no values now but could have some."""
        return [
            (entries, leaf, tensor)
            for entries in (module._parameters, module._buffers)
            for leaf, tensor in entries.items()
            if tensor is not None and id(tensor) in self._names
        ]

    def _give(self, places: list[tuple[dict[str, Any], str, torch.Tensor]], own: bool) -> None:
        """Puts values where there are none.

        Args:
            places: from `_entries`.
            own: whether they are the model's own, and not views of a file.
        """
        new: dict[str, torch.Tensor] = {}
        for entries, leaf, tensor in places:
            name = self._names[id(tensor)]
            if name not in new:
                value = self.values([name])[name]
                value = value.to(self.device, copy=own)
                new[name] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
            entries[leaf] = new[name]


def _put_back(places: list[tuple[dict[str, Any], str, torch.Tensor]]) -> None:
    for entries, leaf, tensor in places:
        entries[leaf] = tensor


@contextmanager
def shapes_only(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """The blocks compute nothing but the shapes of their results, for the time of the block."""
    blocks = list(blocks)
    buffers = [
        (module._buffers, leaf, buffer)
        for block in blocks
        for module in block.modules()
        for leaf, buffer in module._buffers.items()
        if buffer is not None
    ]

    def on_meta(leaf: Any) -> Any:
        return leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf

    def without_values(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: forward(*mapped(on_meta, args), **mapped(on_meta, kwargs))

    try:
        for entries, leaf, buffer in buffers:
            entries[leaf] = buffer.to("meta")
        for block in blocks:
            block.forward = without_values(block.forward)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
        _put_back(buffers)
