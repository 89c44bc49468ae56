"""Static attributes that follow from sizes: found by rule, from what a module's code was seen to do, and checked."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from hfprune.structure.graph import module_path, operation
from hfprune.structure.groups import Structure
from hfprune.structure.sizes import Changes, argument_changes, group_count, shape_changes
from hfprune.structure.surgery import Journal
from hfprune.weights import is_transposed_linear

# Numbers of a module that are no sizes of its channels, by the words of their names.
# fmt: off
_OTHER_WORDS = frozenset((
    "idx", "index", "id", "layer", "layers", "depth", "kernel", "stride", "padding", "dilation", "window", "patch",
    "groups", "grid", "img", "image", "eps", "dropout", "drop", "rate", "length", "position", "positions", "pos",
    "vocab",
    "labels", "classes", "experts", "expert", "top", "prob", "block", "blocks", "bucket", "buckets", "area",
    "shift", "max", "min", "token", "tokens", "prefix", "seq", "frames", "mel", "factor", "ratio",
))
# fmt: on


@dataclass(frozen=True)
class Proposal:
    """An attribute that may follow the cut.

    Attributes:
        path: of the module.
        name: of the attribute; `config.x` stands for a value of a config that the module reads.
        value: after the cut.
        certainty: one of LAYER, CLEAR, UNCLEAR, SHAPE.
        key: class and name: modules of one class are treated alike.
        needed: whether a method of the module reads it at all.
    """

    path: str
    name: str
    value: Any
    certainty: int
    key: tuple[str, str]
    needed: bool = True


LAYER, CLEAR, UNCLEAR, SHAPE = range(4)
"""How sure a proposal is: a torch layer's own size; a size that the module's code passes to an operation and that
changed, always alike; one that changed in some places only; one that the module's tensors have."""


def proposals(structure: Structure, gone: np.ndarray) -> list[Proposal]:
    """The attributes that may have to change, most certain first; call it after the tensors were cut.

    torch's own layers say by their weights what they hold. Of any other module an integer (or a list of integers) that
    its methods read may follow, when its value was a size in the module's own code and that size changed.
    """
    found: list[Proposal] = []
    groups = _group_counts(structure, gone)
    by_arguments = argument_changes(structure.walk, gone, structure.already)
    by_shapes = shape_changes(structure.walk, gone, structure.already)
    modules = dict(structure.model.named_modules())
    for path, module in modules.items():
        kind = type(module).__name__
        own = dict(_layer_attributes(module, groups.get(path)))
        found += [Proposal(path, name, v, LAYER, (kind, name)) for name, v in own.items() if getattr(module, name) != v]
        if own:
            continue
        shapes = _with_children(path, modules, by_shapes)
        read = _names_read(type(module))
        for name, value in _sizes_of(module, read):
            # What no method reads can't be needed; it follows so that the module still says what it is.
            needed = name.removeprefix("config.") in read
            # What a parent calls by a method other than forward runs under the parent's name.
            arguments = by_arguments.get(path) or by_arguments.get(path.rpartition(".")[0], {})
            after, certainty = _follow(value, arguments, shapes)
            certainty = certainty if needed else SHAPE
            if after is not None and after != value:
                found.append(Proposal(path, name, after, certainty, (kind, name), needed))
    return sorted(found, key=lambda proposal: proposal.certainty)


def _group_counts(structure: Structure, gone: np.ndarray) -> dict[str, tuple[int, int]]:
    """Path of a convolution or group norm to its number of groups before and after; by whose weight it runs on."""
    counts = {}
    for node in structure.walk.graph.nodes:
        if node.op == "call_function" and ("conv" in operation(node) or "group_norm" in operation(node)):
            found = group_count(structure.walk, node, gone)
            counts[module_path(node)] = found
            for source in node.all_input_nodes:
                if source.name in structure.graph.names:
                    counts[structure.graph.names[source.name].rpartition(".")[0]] = found
    return counts


def apply(model: nn.Module, chosen: Iterable[Proposal], journal: Journal) -> None:
    """Sets attributes; a config is copied first, so that other modules keep theirs."""
    for proposal in chosen:
        module = model.get_submodule(proposal.path)
        if proposal.name.startswith("config."):
            journal.set_attribute(module, "config", copy.copy(module.config))
            journal.set_attribute(module.config, proposal.name.removeprefix("config."), proposal.value)
        else:
            journal.set_attribute(module, proposal.name, proposal.value)


def _layer_attributes(module: nn.Module, groups: tuple[int, int] | None) -> Iterator[tuple[str, Any]]:
    """What a layer of torch's says about its own weights."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        yield from (("out_features", weight.shape[0]), ("in_features", weight.shape[1]))
    elif isinstance(module, nn.modules.conv._ConvNd):
        count = groups[1] if groups else module.groups
        first, second = weight.shape[:2]
        incoming, outgoing = (first, second * count) if module.transposed else (second * count, first)
        yield from (("groups", count), ("in_channels", incoming), ("out_channels", outgoing))
    elif isinstance(module, nn.modules.batchnorm._NormBase) and weight is not None:
        yield "num_features", len(weight)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and weight is not None:
        yield "normalized_shape", tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm) and weight is not None:
        yield "num_channels", len(weight)
        if groups:
            yield "num_groups", groups[1]
    elif is_transposed_linear(module):
        yield from (("nx", weight.shape[0]), ("nf", weight.shape[1]))
    elif isinstance(module, nn.Embedding):
        yield from (("num_embeddings", weight.shape[0]), ("embedding_dim", weight.shape[1]))


def _sizes_of(module: nn.Module, read: set[str]) -> Iterator[tuple[str, Any]]:
    """Integers and lists of integers whose names may say sizes; of a config those that the module's methods read."""
    own = dict(vars(module))
    config = own.get("config")
    if "config" in read and hasattr(config, "to_dict"):
        own |= {f"config.{name}": value for name, value in config.to_dict().items() if name in read}
    for name, value in own.items():
        words = set(re.split(r"[_.]|(?<=[a-z])(?=[A-Z])", name.lower()))
        numbers = value if isinstance(value, tuple | list) else (value,)
        if name.startswith("_") or not numbers or words & _OTHER_WORDS:
            continue
        if all(type(number) is int and number > 0 for number in numbers) and max(numbers) > 1:
            yield name, value


def _names_read(kind: type) -> set[str]:
    """The names that a class's methods read, apart from its constructor."""
    names: set[str] = set()
    for owner in kind.__mro__:
        if owner is nn.Module:
            break
        for name, member in vars(owner).items():
            code = getattr(getattr(member, "__wrapped__", member), "__code__", None)
            if code is not None and name != "__init__":
                names |= _code_names(code)
    return names


def _code_names(code: Any) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            names |= _code_names(constant)
    return names


def _with_children(path: str, modules: dict[str, nn.Module], changes: dict[str, Changes]) -> Changes:
    """The sizes that a module's own code and that of its direct children handle."""
    merged: Changes = {}
    names = [path, *(f"{path}.{child}" if path else child for child, _ in modules[path].named_children())]
    for name in names:
        for before, after in changes.get(name, {}).items():
            merged.setdefault(before, set()).update(after)
    return merged


def _follow(value: Any, arguments: Changes, shapes: Changes) -> tuple[Any, int]:
    """The value after the cut and how sure that is; None where nothing can be said."""
    if isinstance(value, tuple | list):
        found = [_follow(number, arguments, shapes) for number in value]
        after = type(value)(new if new is not None else old for (new, _), old in zip(found, value, strict=True))
        return after, max(certainty for _, certainty in found)
    in_code, seen = arguments.get(value, set()), shapes.get(value, set())
    if len(in_code) == 1:
        return next(iter(in_code)), CLEAR
    if len(in_code - {value}) == 1:
        return next(iter(in_code - {value})), UNCLEAR
    if not in_code and len(seen) == 1:
        return next(iter(seen)), SHAPE
    return None, SHAPE
