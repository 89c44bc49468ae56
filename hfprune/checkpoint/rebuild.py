"""Rebuilding a pruned model: a skeleton takes the sizes of the tensors and the facts of the plan. Data, never code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hfprune.checkpoint.sizes import mend
from hfprune.errors import CheckpointError, ModelError
from hfprune.lowrank.factor import Factored, can_factor, factored_like, put
from hfprune.structure.plan import Plan

Shape = tuple[int, ...]

# How blocks call their own position in the model.
_POSITIONS = {"layer_idx", "layer_id", "layer_index", "layer_number", "layer_num", "block_idx", "block_id"}


class Rebuild:
    """Makes a skeleton, which may lie on the meta device, into the pruned model, step by step: drop, factor, resize,
    finish.

    The whole plan is looked up in the skeleton first, so that one that does not fit raises before anything is changed.

    Args:
        model: the dense model's skeleton.
        plan: with the paths that the skeleton has; `fitted` adapts those of another head or wrapper.

    Raises:
        CheckpointError: the plan names what the skeleton does not have, or asks for what data may not do.
    """

    def __init__(self, model: nn.Module, plan: Plan):
        self.model = model
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._resized: dict[int, nn.Module] = {}
        self._blocks = self._look_up_blocks(plan.dropped)
        self._factored = [(self._module(path), path, rank) for path, rank in plan.factored.items()]
        for module, path, _ in self._factored:
            if not isinstance(module, Factored) and not can_factor(module):
                raise CheckpointError(f"the plan factors '{path}', and a {type(module).__name__} can't be")
        gone = tuple(f"{path}." for path in plan.dropped)
        here = [path for path in plan.attributes if not f"{path}.".startswith(gone)]
        self._attributes = [
            (path, self._module(path), name, value)
            for path in here
            for name, value in plan.attributes[path].items()
            if _settable(path, self._module(path), name, value)
        ]
        self._buffers = [
            (*self._buffer(path, cut), cut) for path, cut in plan.buffers.items() if not path.startswith(gone)
        ]

    def _module(self, path: str) -> nn.Module:
        if path not in self._modules:
            raise CheckpointError(f"the plan names '{path}', which {type(self.model).__name__} does not have")
        return self._modules[path]

    def _look_up_blocks(self, dropped: list[str]) -> list[tuple[nn.Module, str]]:
        blocks = []
        for path in dropped:
            self._module(path)
            parent, _, key = path.rpartition(".")
            container = self._modules[parent]
            if not isinstance(container, nn.ModuleList | nn.Sequential):
                raise CheckpointError(f"the plan drops '{path}', which is no element of a list of blocks")
            blocks.append((container, key))
        return blocks

    def _buffer(self, path: str, cut: dict[int, list[int]]) -> tuple[nn.Module, str]:
        parent, _, leaf = path.rpartition(".")
        owner = self._module(parent)
        value = owner._buffers.get(leaf)
        if value is None or leaf not in owner._non_persistent_buffers_set:
            raise CheckpointError(f"the plan cuts '{path}', which is no buffer that files leave out")
        for dim, kept in cut.items():
            if dim >= value.ndim or (kept and max(kept) >= value.shape[dim]):
                raise CheckpointError(f"the plan cuts '{path}' where it has the shape {tuple(value.shape)}")
        return owner, leaf

    def drop(self) -> None:
        """Takes the dropped blocks out; those that stay close ranks, and know their new position."""
        containers = {id(container): container for container, _ in self._blocks}
        for container in containers.values():
            gone = {key for owner, key in self._blocks if owner is container}
            numbered = all(key.isdigit() for key in container._modules)
            kept = [(key, block) for key, block in container._modules.items() if key not in gone]
            container._modules.clear()
            for position, (key, block) in enumerate(kept):
                container._modules[str(position) if numbered else key] = block
                if numbered and block is not None:
                    _renumber(block, int(key), position)

    def factor(self) -> None:
        """Puts two factors in the place of every factored layer; one that is factored already stays."""
        for module, path, rank in self._factored:
            if isinstance(module, Factored):
                continue
            try:
                put(self.model, module, factored_like(module, rank))
            except ModelError as error:
                raise CheckpointError(f"the plan does not fit '{path}': {error}") from error

    def resize(self, shapes: Mapping[str, Shape]) -> None:
        """Gives every parameter and buffer the shape that is named for it; what is tied stays tied.

        Args:
            shapes: tensor name, as in the state dict → shape. Tensors without a shape stay as they are.

        Raises:
            CheckpointError: a tensor would have to grow, or two that are one are told to differ.
        """
        for names, tensor in _tensors(self.model):
            told = {tuple(shapes[name]) for name in names if name in shapes}
            if len(told) > 1:
                raise CheckpointError(f"'{names[0]}' and '{names[1]}' are one tensor with two shapes")
            for shape in told - {tuple(tensor.shape)}:
                if len(shape) != tensor.ndim or any(new > old for new, old in zip(shape, tensor.shape, strict=True)):
                    raise CheckpointError(
                        f"'{names[0]}' has the shape {shape}, which can't be cut from {tuple(tensor.shape)}"
                    )
                self._replace(names, tensor, shape)

    def _replace(self, names: list[str], tensor: torch.Tensor, shape: Shape) -> None:
        new = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            new.__dict__.update(tensor.__dict__)
        for name in names:
            parent, _, leaf = name.rpartition(".")
            owner = self.model.get_submodule(parent)
            setattr(owner, leaf, new)
            self._resized[id(owner)] = owner

    def finish(self) -> list[nn.Module]:
        """Sets what follows from shapes and plan: attributes, and the buffers that no file holds.

        Returns:
            The modules that the pruning changed.

        Raises:
            CheckpointError: an attribute contradicts the shapes.
        """
        for module in {id(m): m for _, m, name, _ in self._attributes if name.startswith("config.")}.values():
            module.config = copy.copy(module.config)
        for _, module, name, value in self._attributes:
            owner, leaf = _place(module, name)
            setattr(owner, leaf, _like(getattr(owner, leaf), value))
        told = {(id(module), name) for _, module, name, _ in self._attributes}
        for module in self._resized.values():
            mend(module, {name for owner, name in told if owner == id(module)})
        for path, module, name, value in self._attributes:
            now = getattr(*_place(module, name))
            if now != _like(now, value):
                raise CheckpointError(f"the plan's {path}.{name} is {value}, but the shapes say {now}")
        for owner, leaf, cut in self._buffers:
            value = owner._buffers[leaf]
            for dim, kept in cut.items():
                value = value.index_select(dim, torch.tensor(kept, dtype=torch.long, device=value.device))
            owner._buffers[leaf] = value
        changed = {id(module): module for _, module, _, _ in self._attributes} | self._resized
        return list(changed.values())


def _tensors(model: nn.Module) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Every parameter and every buffer that files hold, once, with all of its names."""
    places: dict[int, tuple[list[str], torch.Tensor]] = {}
    for path, module in model.named_modules():
        buffers = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for leaf, tensor in (module._parameters | buffers).items():
            if tensor is not None:
                places.setdefault(id(tensor), ([], tensor))[0].append(f"{path}.{leaf}" if path else leaf)
    yield from places.values()


def _renumber(block: nn.Module, old: int, new: int) -> None:
    for module in block.modules():
        for name in _POSITIONS & vars(module).keys():
            if type(vars(module)[name]) is int and vars(module)[name] == old:
                setattr(module, name, new)


def _place(module: nn.Module, name: str) -> tuple[Any, str]:
    """What holds an attribute, and its name there: the module, or the config that it reads."""
    if name.startswith("config."):
        return module.config, name.removeprefix("config.")
    return module, name


def _settable(path: str, module: nn.Module, name: str, value: Any) -> bool:
    """Whether a plan may set this: a number, or integers in a row, that the module itself holds already.

    Raises:
        CheckpointError: it may not.
    """
    where = f"{path}.{name}" if path else name
    if name.startswith("config.") and not hasattr(getattr(module, "config", None), "attribute_map"):
        raise CheckpointError(f"the plan sets '{where}', but {type(module).__name__} reads no config")
    owner, leaf = _place(module, name)
    if leaf not in vars(owner) or leaf.startswith("_"):
        raise CheckpointError(f"the plan sets '{where}', which {type(module).__name__} does not have as plain data")
    old = vars(owner)[leaf]
    fits = old is None or (type(old) is int and type(value) is int)
    fits = fits or (type(old) is float and type(value) in (int, float))
    if isinstance(old, tuple | list) and isinstance(value, list):
        fits = all(type(item) is int for item in old)
    if not fits:
        raise CheckpointError(
            f"the plan sets '{where}' to {value!r:.80}, where {type(module).__name__} has {old!r:.80}"
        )
    return True


def _like(old: Any, value: Any) -> Any:
    """A value from JSON in the type that the module uses."""
    if isinstance(value, list):
        return torch.Size(value) if isinstance(old, torch.Size) else tuple(value) if isinstance(old, tuple) else value
    return float(value) if isinstance(old, float) else value


def fitted(plan: Plan, model: nn.Module, prefix: str, exact: bool = True) -> Plan:
    """The plan in the paths of this model, which may have the backbone inside or be the backbone alone.

    Args:
        plan: as it was recorded.
        model: the skeleton.
        prefix: what the backbone is called inside a model with a head (transformers' `base_model_prefix`).
        exact: whether the model is of the class that was recorded; otherwise what it lacks is passed over.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    paths = [*plan.attributes, *plan.buffers, *plan.dropped, *plan.factored]
    inside = [path for path in paths if f"{path}.".startswith(f"{prefix}.")]
    strip = bool(prefix) and bool(inside) and prefix not in modules
    add = bool(prefix) and not inside and prefix in modules and not any(path and path in modules for path in paths)

    def translated(path: str) -> str | None:
        if strip:
            if path not in inside:
                return None
            return path[len(prefix) :].lstrip(".")
        return f"{prefix}.{path}".rstrip(".") if add else path

    def here(path: str | None, owner: Callable[[str], str] = lambda path: path) -> bool:
        return path is not None and (exact or strip or owner(path) in modules)

    def renamed(entries: dict[str, Any], owner: Callable[[str], str] = lambda path: path) -> dict[str, Any]:
        return {new: entries[old] for old in entries if here(new := translated(old), owner)}

    return Plan(
        attributes=renamed(plan.attributes),
        buffers=renamed(plan.buffers, lambda path: path.rpartition(".")[0]),
        dropped=[new for old in plan.dropped if here(new := translated(old))],
        config=plan.config,
        dense_config=plan.dense_config,
        factored=renamed(plan.factored),
    )


def rebuild(model: nn.Module, plan: Plan, shapes: Mapping[str, Shape]) -> list[nn.Module]:
    """Makes a dense model into the pruned one, in place; the values of its tensors are then still to be loaded.

    Args:
        model: the dense model or its skeleton.
        plan: what was done to it.
        shapes: tensor name → shape, of the pruned model.

    Returns:
        The modules that changed.

    Raises:
        CheckpointError: plan and shapes do not fit the model, which may then be half changed; see `unchanged_on_error`.
    """
    steps = Rebuild(model, plan)
    steps.drop()
    steps.factor()
    steps.resize(shapes)
    return steps.finish()


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Puts a model's structure back if the block raises. Values that were written into its tensors stay written."""
    before = [
        (module, {name: copy.copy(v) if type(v) in (dict, list, set) else v for name, v in vars(module).items()})
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, values in before:
            vars(module).clear()
            vars(module).update(values)
        raise
