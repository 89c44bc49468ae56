"""How large every tensor in the graph becomes after a cut, and which sizes a module's code therefore sees change."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from hfprune.structure.coupling import FACTORIES, Walk, named_arguments
from hfprune.structure.graph import module_path, operation
from hfprune.structure.identities import Value, axes

Changes = dict[int, set[int]]
"""A size before the cut to the sizes after it."""


def kept_along(value: Value, gone: np.ndarray) -> dict[int, torch.Tensor]:
    """Dimension to the indices that stay, for every dimension of a value that loses something."""
    kept = {}
    for layer in value.layers:
        varies = axes(layer)
        if len(varies) == 1:
            stays = ~gone[layer.flatten().numpy()]
            if not stays.all():
                kept[next(iter(varies))] = torch.from_numpy(np.flatnonzero(stays))
    return kept


def new_shape(value: Value, gone: np.ndarray) -> tuple[int, ...]:
    """The shape after the cut."""
    kept = kept_along(value, gone)
    return tuple(len(kept[dim]) if dim in kept else size for dim, size in enumerate(value.shape))


def argument_changes(walk: Walk, gone: np.ndarray, already: np.ndarray) -> dict[str, Changes]:
    """Module path to the sizes that its own code passes to operations, before (`already`) and after the cut."""
    changes: dict[str, Changes] = defaultdict(lambda: defaultdict(set))
    for node in walk.graph.nodes:
        if node.op == "call_function":
            own = changes[module_path(node)]
            for before, after in _argument_sizes(walk, node, gone, already):
                own[before].add(after)
    return changes


def shape_changes(walk: Walk, gone: np.ndarray, already: np.ndarray) -> dict[str, Changes]:
    """Module path to the sizes of all tensors that its code handles, before (`already`) and after the cut."""
    changes: dict[str, Changes] = defaultdict(lambda: defaultdict(set))
    sizes: dict[Node, list[tuple[int, int]]] = {}
    for node in walk.graph.nodes:
        if node.op != "call_function":
            continue
        own = changes[module_path(node)]
        for handled in (*node.all_input_nodes, node):
            value = walk.values.get(handled)
            if isinstance(value, Value):
                if handled not in sizes:
                    sizes[handled] = list(zip(new_shape(value, already), new_shape(value, gone), strict=True))
                for before, after in sizes[handled]:
                    own[before].add(after)
    return changes


def _argument_sizes(walk: Walk, node: Node, gone: np.ndarray, already: np.ndarray) -> Iterator[tuple[int, int]]:
    """Sizes among the arguments of a step, before and after."""
    name = operation(node)
    result = walk.values.get(node)
    if name in ("view", "reshape", "_unsafe_view", "expand", "unflatten", "repeat", "flatten", "broadcast_to"):
        if isinstance(result, Value):
            given = _given_sizes(node, len(result.shape))
            for asked, before, after in zip(given, new_shape(result, already), new_shape(result, gone), strict=True):
                if asked != -1:  # what the code leaves open follows by itself
                    yield before, after
    elif name in ("split_with_sizes", "split", "chunk", "tensor_split") and isinstance(result, tuple):
        for part in result:
            if isinstance(part, Value):
                yield from zip(new_shape(part, already), new_shape(part, gone), strict=True)
    elif name in ("slice", "narrow") and isinstance(result, Value):
        yield from _slice_bounds(walk, node, result, gone, already)
    elif name in FACTORIES and isinstance(result, Value):
        yield from zip(new_shape(result, already), new_shape(result, gone), strict=True)


def _given_sizes(node: Node, rank: int) -> list[Any]:
    """The sizes that a step was called with, one a dimension of its result; -1 where the code left it open."""
    arguments = named_arguments(node, node.args, node.kwargs)
    sizes = arguments.get("size", arguments.get("shape"))
    return list(sizes) if isinstance(sizes, list | tuple) and len(sizes) == rank else [None] * rank


def _slice_bounds(
    walk: Walk, node: Node, result: Value, gone: np.ndarray, already: np.ndarray
) -> Iterator[tuple[int, int]]:
    arguments = named_arguments(node, node.args, node.kwargs)
    source = walk.values.get(node.args[0])
    if not isinstance(source, Value):
        return
    dim = arguments["dim"] % len(source.shape)
    layer = source.along(dim)
    whole = np.ones(source.shape[dim], bool)
    was, stays = (whole, whole) if layer is None else (~already[layer.numpy()], ~gone[layer.numpy()])
    for bound in (arguments.get("start"), arguments.get("end")):
        if isinstance(bound, int) and 0 < bound <= source.shape[dim]:
            yield int(was[:bound].sum()), int(stays[:bound].sum())
    yield new_shape(result, already)[dim], new_shape(result, gone)[dim]


def group_count(walk: Walk, node: Node, gone: np.ndarray) -> tuple[int, int]:
    """The number of groups of a convolution or group norm, before and after the cut."""
    arguments: dict[str, Any] = named_arguments(node, node.args, node.kwargs)
    groups = arguments.get("groups", arguments.get("num_groups", arguments.get("group", 1)))
    if groups == 1:
        return 1, 1
    value = walk.values[node.args[0]]
    channels = value.shape[1]
    now = new_shape(value, gone)[1]
    if "norm" in operation(node):
        return groups, now if groups == channels else groups
    weight = walk.values[node.args[1]]
    per_group = new_shape(weight, gone)[0 if "transpose" in operation(node) else 1]
    if "transpose" in operation(node):
        return groups, groups
    return groups, now // per_group
