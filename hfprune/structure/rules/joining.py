"""Operations that join several tensors, or look elements up."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from hfprune.structure.coupling import MISMATCH, Walk, rule
from hfprune.structure.graph import operation
from hfprune.structure.identities import Value, axes


@rule("cat", "concat", "concatenate", "stack")
def _cat(walk: Walk, node: Node, arguments: dict[str, Any]) -> Value:
    pieces: list[Value] = list(arguments["tensors"])
    shape = tuple(node.meta["val"].shape)
    dim = arguments.get("dim", 0) % len(shape)
    if operation(node) == "stack":
        pieces = [
            Value((*p.shape[:dim], 1, *p.shape[dim:]), tuple(layer.unsqueeze(dim) for layer in p.layers))
            for p in pieces
        ]
    pieces = [piece for piece in pieces if len(piece.shape) == len(shape) and piece.shape[dim]]
    across: dict[frozenset[int], torch.Tensor] = {}
    for varies in dict.fromkeys(axes(layer) for piece in pieces for layer in piece.layers):
        if dim in varies:
            continue
        for piece in pieces:  # the other dimensions are the same ones in every piece
            own = next((layer for layer in piece.layers if axes(layer) == varies), None)
            if own is not None:
                across[varies] = walk.unite(across[varies], own) if varies in across else own
        for piece in pieces:
            if not any(axes(layer) == varies for layer in piece.layers):
                overlapping = [layer for layer in piece.layers if axes(layer) & varies]
                for layer in overlapping:
                    walk.defer_collapse(MISMATCH, layer, axes(layer) & varies)
                    walk.defer_collapse(MISMATCH, across[varies], axes(layer) & varies)
                if not overlapping:
                    walk.protect(across[varies], "is joined with something of fixed size")
    joined = []
    for varies in dict.fromkeys(axes(layer) for piece in pieces for layer in piece.layers if dim in axes(layer)):
        parts = []
        for piece in pieces:
            own = next((layer for layer in piece.layers if axes(layer) == varies), None)
            size = [n if d in varies else 1 for d, n in enumerate(piece.shape)]
            parts.append(torch.zeros(size, dtype=torch.int64) if own is None else own.expand(size))
        joined.append(torch.cat(parts, dim))
    return walk.value(shape, [*across.values(), *joined])


@rule("embedding")
def _embedding(walk: Walk, node: Node, arguments: dict[str, Any]) -> Value:
    table, index = arguments["weight"], arguments["indices"]
    shape = tuple(node.meta["val"].shape)
    layers = []
    for layer in table.layers:
        if axes(layer) == {1}:
            layers.append(layer.flatten().view([1] * len(index.shape) + [-1]))
        else:
            walk.protect(layer, "is a vocabulary")
    return walk.value(shape, layers)


@rule("index", "index_select")
def _index(walk: Walk, node: Node, arguments: dict[str, Any]) -> Value:
    """Dimensions that are not looked up stay; looked-up ones can be cut only where the index is known."""
    value = arguments["self"]
    shape = tuple(node.meta["val"].shape)
    if operation(node) == "index_select":
        given: list[Any] = [None] * len(value.shape)
        given[arguments["dim"]] = arguments["index"]
    else:
        given = list(arguments["indices"])
    looked_up = _indexed_dims(given)
    layers = []
    for layer in value.layers:
        if axes(layer) & looked_up and any(i is not None and i.constant is None for i in given):
            walk.protect(layer, "is looked up by an index that depends on the input")
            continue
        moved = layer.expand(value.shape)[_index_values(given, bool(axes(layer) & looked_up))]
        layers.append(moved.expand(shape))
    return walk.value(shape, layers)


def _indexed_dims(given: list[Any]) -> set[int]:
    """The dimensions of the source that the indices take; a boolean mask takes as many as it has."""
    taken, dim = set(), 0
    for index in given:
        wide = len(index.shape) if index is not None and index.constant is not None and index.constant.dtype in (
            torch.bool, torch.uint8) else 1  # fmt: skip
        if index is not None:
            taken |= set(range(dim, dim + wide))
        dim += wide
    return taken


def _index_values(given: list[Any], real: bool) -> tuple[Any, ...]:
    """The indices; zeros of the same shape where only the shape counts."""
    values: list[Any] = []
    for index in given:
        if index is None:
            values.append(slice(None))
        elif index.constant is not None:
            values.append(index.constant)
        else:
            values.append(torch.zeros(index.shape, dtype=torch.int64))
    return tuple(values)


@rule("where", "masked_fill", "copy", "masked_scatter")
def _choose(walk: Walk, node: Node, arguments: dict[str, Any]) -> Value:
    values = [x for x in arguments.values() if isinstance(x, Value)]
    return walk.elementwise(values, node.meta["val"].shape)


@rule("gather")
def _gather(walk: Walk, node: Node, arguments: dict[str, Any]) -> Value:
    """Taken along one dimension; the others are those of source and index alike."""
    value, dim = arguments["self"], arguments["dim"] % len(arguments["self"].shape)
    shape = tuple(node.meta["val"].shape)
    layers = []
    for layer in value.layers:
        same = all(shape[d] == value.shape[d] for d in axes(layer) if d != dim)
        if dim in axes(layer) or not same:
            walk.protect(layer, "is looked up by an index that depends on the input")
        else:
            layers.append(layer)
    for layer in arguments["index"].layers:
        walk.protect(layer, "is an index")
    return walk.value(shape, layers)
