"""Operations that move elements: the identities are moved alike."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from hfprune.structure.coupling import EVEN_PARTS, Walk, rule
from hfprune.structure.graph import operation
from hfprune.structure.identities import Value, axes

_RESHAPES = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "reshape_as", "view_as", "ravel")
_COPIES = ("clone", "contiguous", "alias", "detach", "lift_fresh_copy", "to", "_to_copy", "type_as", "float", "half",
           "zeros_like", "ones_like", "empty_like", "rand_like", "randn_like", "full_like", "dropout", "positive",
           "feature_dropout", "_assert_tensor_metadata", "native_dropout", "alpha_dropout", "bernoulli")  # fmt: skip


@rule(*_COPIES)
def _same(walk: Walk, node: Node, arguments: dict[str, Any]) -> Any:
    value = next(x for x in arguments.values() if isinstance(x, Value))
    found = node.meta.get("val")
    if not isinstance(found, torch.Tensor):
        return value
    return Value(tuple(found.shape), value.layers, value.constant, value.is_parameter)


@rule(*_RESHAPES)
def _reshape(walk: Walk, node: Node, arguments: dict[str, Any]) -> Value:
    value = arguments["self"]
    shape = tuple(node.meta["val"].shape)
    layers = [_reshaped(layer, value.shape, shape) for layer in value.layers]
    constant = None if value.constant is None else value.constant.reshape(shape)
    return walk.value(shape, layers, constant=constant, is_parameter=value.is_parameter)


def _reshaped(layer: torch.Tensor, before: tuple[int, ...], after: tuple[int, ...]) -> torch.Tensor:
    """A compact layer in a new shape; what stays the same in front and at the end is not expanded."""
    front = 0
    while front < min(len(before), len(after)) and before[front] == after[front]:
        front += 1
    back = 0
    while back < min(len(before), len(after)) - front and before[-1 - back] == after[-1 - back]:
        back += 1
    sizes = [n if front <= d < len(before) - back else layer.shape[d] for d, n in enumerate(before)]
    kept_back = list(layer.shape[len(before) - back :])
    middle = after[front : len(after) - back]
    return layer.expand(sizes).reshape([*layer.shape[:front], *middle, *kept_back])


@rule(
    "permute", "transpose", "unsqueeze", "squeeze", "expand", "expand_as", "slice", "select", "unbind", "split",
    "split_with_sizes", "chunk", "roll", "narrow", "repeat", "repeat_interleave", "movedim", "t", "numpy_T", "tile",
    "flip", "unfold", "swapaxes", "swapdims", "unsafe_split", "unsafe_chunk", "tensor_split", "pixel_shuffle",
    "pixel_unshuffle", "mT", "moveaxis", "diagonal", "select_copy", "slice_copy", "adjoint", "channel_shuffle",
    "broadcast_to", "as_strided", "rot90", "tril", "triu", "hsplit", "vsplit",
)  # fmt: skip
def _move(walk: Walk, node: Node, arguments: dict[str, Any]) -> Any:
    value = arguments["self"]
    others = {name: x.shape if isinstance(x, Value) else x for name, x in arguments.items() if name != "self"}
    if operation(node) in ("expand_as",):
        moved = [layer.expand(tuple(node.meta["val"].shape)) for layer in value.full()]
    else:
        moved = [_moved(node, layer, others) for layer in value.full()]
    constant = None if value.constant is None else _moved(node, value.constant, others)
    found = node.meta["val"]
    if isinstance(found, torch.Tensor):
        _even_halves(walk, node, value, arguments)
        return walk.value(found.shape, moved, constant=constant, is_parameter=value.is_parameter)
    _even_parts(walk, node, value, [tuple(part.shape) for part in found])
    return tuple(
        walk.value(
            part.shape,
            [layer[index] for layer in moved],
            constant=None if constant is None else constant[index],
            is_parameter=value.is_parameter,
        )
        for index, part in enumerate(found)
    )


@rule("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d", "reflection_pad1d", "replication_pad1d",
      "reflection_pad3d", "replication_pad3d")  # fmt: skip
def _pad(walk: Walk, node: Node, arguments: dict[str, Any]) -> Value:
    """New elements belong to nothing, so that what meets them is fixed; copied ones to what they were copied from."""
    value = arguments["self"]
    widths = arguments.get("pad") or arguments.get("padding")
    shape = tuple(node.meta["val"].shape)
    padded = {len(shape) - 1 - index // 2 for index, width in enumerate(widths) if width}
    layers = []
    for layer in value.layers:
        if not axes(layer) & padded:
            layers.append(layer)
            continue
        if (arguments.get("mode") or operation(node)) not in ("constant", "pad", "constant_pad_nd"):
            walk.protect(layer, "is padded")
            continue
        grown = torch.nn.functional.pad(layer.expand(value.shape), widths)
        layers.append(grown)
    return walk.value(shape, layers)


def _moved(node: Node, tensor: torch.Tensor, others: dict[str, Any]) -> Any:
    schema = node.target._schema
    args = [tensor if argument.name == "self" else others[argument.name] for argument in schema.arguments
            if not argument.kwarg_only and argument.name in ({"self"} | others.keys())]  # fmt: skip
    keywords = {a.name: others[a.name] for a in schema.arguments if a.kwarg_only and a.name in others}
    try:
        return node.target(*args, **keywords)
    except (RuntimeError, NotImplementedError):  # not written for integers, or not for these strides
        moved = node.target(tensor.contiguous().double() if args[0] is tensor else tensor, *args[1:], **keywords)
        return moved.long() if isinstance(moved, torch.Tensor) else [part.long() for part in moved]


def _even_parts(walk: Walk, node: Node, value: Value, shapes: list[tuple[int, ...]]) -> None:
    """Parts of equal size are most often counted by the code, so that they stay equal."""
    if operation(node) == "unbind" or len(set(shapes)) != 1 or len(shapes) < 2:
        return
    dim = next((d for d, (a, b) in enumerate(zip(value.shape, shapes[0], strict=True)) if a != b), None)
    layer = None if dim is None else value.along(dim)
    if layer is not None:
        parts = layer.view(len(shapes), -1)
        walk.defer(EVEN_PARTS, parts[:1], parts)


def _even_halves(walk: Walk, node: Node, value: Value, arguments: dict[str, Any]) -> None:
    if operation(node) != "slice":
        return
    dim = arguments["dim"] % len(value.shape)
    size, start, end = value.shape[dim], arguments["start"] or 0, arguments["end"]
    end = size if end is None else min(end % size if end < 0 else end, size)
    layer = value.along(dim)
    if layer is not None and arguments.get("step", 1) == 1 and size % 2 == 0 and end - start == size // 2:
        if walk.is_head(layer):  # queries beside keys and values, which attention couples as they need
            return
        halves = layer.view(2, -1)
        walk.defer(EVEN_PARTS, halves[:1], halves)
    elif layer is not None and arguments.get("step", 1) != 1:
        walk.protect(layer, "is taken in strides")
