"""Convolutions, grouped ones too, and what looks at patches."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.fx import Node

from hfprune.structure.coupling import MISMATCH, Product, Walk, rule
from hfprune.structure.graph import module_path
from hfprune.structure.identities import Value, axes


@rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution(walk: Walk, node: Node, arguments: dict[str, Any]) -> Value:
    value, weight, bias = arguments["input"], arguments["weight"], arguments["bias"]
    transposed = "transpose" in str(node.target) or bool(arguments.get("transposed"))
    groups = arguments.get("groups", 1)
    shape = tuple(node.meta["val"].shape)
    unbatched = len(shape) == len(weight.shape) - 1
    channel = 0 if unbatched else 1
    for layer in weight.layers:
        if not axes(layer) <= {0, 1} or len(axes(layer)) > 1:
            walk.protect(layer, "is a kernel")
    first, second = weight.along(0), weight.along(1)
    outgoing, incoming = (second, first) if transposed else (first, second)
    x = _channels(walk, value, channel)
    carried = [layer for layer in value.layers if channel > 0 and axes(layer) == {0}]
    if groups == 1:
        _meet(walk, x, incoming)
    else:
        if transposed:
            outgoing = None if outgoing is None else outgoing.repeat(groups)
        outgoing = _grouped(walk, x, incoming, outgoing, groups, transposed, shape[channel], value.shape[channel])
    if outgoing is not None:
        carried.append(outgoing.view([-1 if d == channel else 1 for d in range(len(shape))]))
    kernel = prod(weight.shape[2:])
    positions = prod(value.shape[channel + 1 :] if transposed else shape[channel + 1 :])
    _count(walk, node, shape[channel], value.shape[channel], groups, kernel * positions, x, outgoing)
    result = walk.value(shape, carried)
    if bias is None:
        return result
    own = Value((bias.shape[0], *(1,) * (len(shape) - channel - 1)),
                tuple(layer.reshape(-1, *(1,) * (len(shape) - channel - 1)) for layer in bias.layers))  # fmt: skip
    return walk.elementwise([result, own], shape)


def _channels(walk: Walk, value: Value, channel: int) -> torch.Tensor | None:
    """The identities along the channels; what varies along the positions can't be cut."""
    found = None
    for layer in value.layers:
        varies = axes(layer)
        if varies == {channel}:
            found = layer.flatten()
        elif channel in varies:
            walk.defer_collapse(MISMATCH, layer, [channel])
        elif varies != {0}:
            walk.protect(layer, "is a position of a convolution")
    return found


def _meet(walk: Walk, left: torch.Tensor | None, right: torch.Tensor | None) -> None:
    if left is not None and right is not None:
        walk.unite(left, right)
    for layer in (left, right):
        if layer is not None and (left is None or right is None):
            walk.protect(layer, "meets something of fixed size")


def _grouped(
    walk: Walk, x: Any, incoming: Any, outgoing: Any, groups: int, transposed: bool, outputs: int, inputs: int
) -> torch.Tensor | None:
    """One channel a group on either side: whole groups go. Otherwise equal positions of all groups go together."""
    if inputs == groups or outputs == groups:
        slices = [None if t is None else t.view(groups, -1) for t in (x, incoming if transposed else outgoing)]
        if transposed:
            slices.append(None)  # the outputs repeat in every group; they are not cut
            if outgoing is not None:
                walk.protect(outgoing, "is repeated in every group")
        elif incoming is not None:
            walk.protect(incoming, "is the inside of a group")
        for layer in slices:
            if layer is not None:
                walk.partition.union(layer[:, :1], layer)
        heads = [None if layer is None else layer[:, 0] for layer in slices[:2]]
        _meet(walk, heads[0], heads[1])
        return None if transposed else outgoing
    for layer in (x, None if transposed else outgoing):
        if layer is not None:
            positions = layer.view(groups, -1)
            walk.partition.union(positions[:1], positions)
    if transposed:
        if incoming is not None:
            positions = incoming.view(groups, -1)
            walk.partition.union(positions[:1], positions)
        _meet(walk, x, incoming)
    else:
        _meet(walk, None if x is None else x.view(groups, -1)[0], incoming)
    return outgoing


def _count(walk: Walk, node: Node, outputs: int, inputs: int, groups: int, rest: int, x: Any, outgoing: Any) -> None:
    """Multiplications: outputs x inputs a group x kernel x positions; whole groups that go take theirs with them."""
    per_group = inputs // groups
    if groups > 1 and (per_group == 1 or outputs == groups):
        factors = [] if outgoing is None else [outgoing]
        constant = per_group * rest * (outputs if outgoing is None else 1)
    else:
        factors = [layer for layer in (x, outgoing) if layer is not None]
        constant = rest * (1 if outgoing is not None else outputs) * (1 if x is not None else inputs)
        if constant % groups == 0:
            constant //= groups
        else:
            constant = constant / groups
    walk.products.append(Product(module_path(node), constant, factors))


@rule("im2col")
def _unfold(walk: Walk, node: Node, arguments: dict[str, Any]) -> Value:
    """(B, C, H, W) to (B, C x kernel, positions): a channel stands once for each place of the kernel."""
    value, shape = arguments["self"], tuple(node.meta["val"].shape)
    x = _channels(walk, value, 1)
    if x is None:
        return walk.value(shape, [])
    return walk.value(shape, [x.repeat_interleave(shape[1] // len(x)).view(1, -1, 1)])


@rule("col2im")
def _fold(walk: Walk, node: Node, arguments: dict[str, Any]) -> Value:
    """(B, C x kernel, positions) to (B, C, H, W)."""
    value, shape = arguments["self"], tuple(node.meta["val"].shape)
    x = _channels(walk, value, 1)
    if x is None:
        return walk.value(shape, [])
    parts = x.view(shape[1], -1)
    walk.partition.union(parts[:, :1], parts)
    return walk.value(shape, [parts[:, 0].view(1, -1, 1, 1)])


@rule("_weight_norm")
def _weight_norm(walk: Walk, node: Node, arguments: dict[str, Any]) -> Value:
    return walk.elementwise([arguments["v"], arguments["g"]], node.meta["val"].shape)
