"""Operations that look along a dimension: sums, norms, softmax, pooling."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node

from hfprune.structure.coupling import MISMATCH, Walk, rule
from hfprune.structure.graph import operation
from hfprune.structure.identities import Value, axes, compact, reduced


def along(walk: Walk, value: Value, dims: Iterable[int], fixed: str | None = None) -> list[torch.Tensor]:
    """The layers that remain when one looks along dimensions.

    Args:
        walk: the walk.
        value: what is looked at.
        dims: the dimensions.
        fixed: the reason, where a unit along them can't be cut because its absence would change the result.
    """
    dims = {dim % max(len(value.shape), 1) for dim in dims}
    kept = []
    for layer in value.layers:
        varies = axes(layer)
        if not varies & dims:
            kept.append(layer)
        elif varies <= dims:
            if fixed:
                walk.protect(layer, fixed)
        else:  # slices along the others: a slice goes as a whole
            walk.defer(MISMATCH, reduced(layer, varies & dims), layer)
            kept.append(compact(reduced(layer, varies & dims)))
    return kept


@rule(
    "sum",
    "mean",
    "amax",
    "amin",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "norm",
    "linalg_vector_norm",
    "logsumexp",
    "all",
    "any",
    "prod",
    "argmax",
    "argmin",
    "max",
    "min",
    "median",
    "topk",
    "sort",
    "nansum",
    "count_nonzero",
)
def _reduce(walk: Walk, node: Node, arguments: dict[str, Any]) -> Any:
    value = arguments.get("self", arguments.get("input"))
    other = arguments.get("other")
    found = node.meta["val"]
    if isinstance(other, Value):  # max and min of two tensors
        return walk.elementwise([value, other], found.shape)
    dims = arguments.get("dim")
    dims = list(range(len(value.shape))) if dims is None or dims == [] else dims
    dims = [dims] if isinstance(dims, int) else dims
    name = operation(node)
    positions = ("argmax", "argmin", "max", "min", "median", "topk", "sort", "prod")
    layers = along(walk, value, dims, "is chosen from" if name in positions else None)
    keep = name in ("topk", "sort") or bool(arguments.get("keepdim"))
    gone = sorted({dim % max(len(value.shape), 1) for dim in dims}, reverse=True)
    if not keep:
        for dim in gone:
            layers = [layer.squeeze(dim) for layer in layers]
    if isinstance(found, torch.Tensor):
        return walk.value(found.shape, layers)
    return tuple(walk.value(part.shape, layers) for part in found)


@rule("cumsum", "cumprod", "logcumsumexp")
def _cumulate(walk: Walk, node: Node, arguments: dict[str, Any]) -> Value:
    value = arguments["self"]
    return walk.value(value.shape, along(walk, value, [arguments["dim"]], "is summed up in order"))


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "softmin")
def _softmax(walk: Walk, node: Node, arguments: dict[str, Any]) -> Value:
    value = arguments["self"]
    return walk.value(value.shape, along(walk, value, [arguments["dim"]], "is compared by softmax"))


@rule("glu")
def _glu(walk: Walk, node: Node, arguments: dict[str, Any]) -> Value:
    value, shape = arguments["self"], tuple(node.meta["val"].shape)
    dim = arguments["dim"] % len(shape)
    halves = [
        walk.value(shape, [p for layer in value.full() for p in [layer.narrow(dim, start, shape[dim])]])
        for start in (0, shape[dim])
    ]
    return walk.elementwise(halves, shape)


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(walk: Walk, node: Node, arguments: dict[str, Any]) -> Any:
    """Statistics over the last dimensions; the affine parameters meet their elements."""
    value = arguments["input"]
    affine = [arguments[name] for name in ("weight", "bias") if isinstance(arguments.get(name), Value)]
    normalized = {len(value.shape) - 1 - i for i in range(len(arguments["normalized_shape"]))}
    for layer in value.layers:
        if axes(layer) & normalized and axes(layer) - normalized:
            walk.defer_collapse(MISMATCH, layer, axes(layer) - normalized)
    found = node.meta["val"]
    result = walk.elementwise([value, *affine], value.shape)
    return result if isinstance(found, torch.Tensor) else (result, *(Value(tuple(f.shape)) for f in found[1:]))


@rule("batch_norm", "instance_norm", "native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
      "_native_batch_norm_legit", "_batch_norm_no_update")  # fmt: skip
def _batch_norm(walk: Walk, node: Node, arguments: dict[str, Any]) -> Any:
    value = arguments["input"]
    names = ("weight", "bias", "running_mean", "running_var")
    own = [_per_channel(arguments[name], len(value.shape)) for name in names if isinstance(arguments.get(name), Value)]
    result = walk.elementwise([value, *own], value.shape)
    found = node.meta["val"]
    return result if isinstance(found, torch.Tensor) else (result, *(Value(tuple(f.shape)) for f in found[1:]))


@rule("group_norm", "native_group_norm")
def _group_norm(walk: Walk, node: Node, arguments: dict[str, Any]) -> Any:
    """Equal positions of all groups go together, so that the groups stay equally large."""
    value, groups = arguments["input"], arguments.get("num_groups", arguments.get("group", 1))
    layer = value.along(1)
    if layer is not None and 1 < groups < len(layer):
        positions = layer.view(groups, -1)
        walk.partition.union(positions[:1], positions)
    own = [
        _per_channel(arguments[n], len(value.shape)) for n in ("weight", "bias") if isinstance(arguments.get(n), Value)
    ]
    result = walk.elementwise([value, *own], value.shape)
    found = node.meta["val"]
    return result if isinstance(found, torch.Tensor) else (result, *(Value(tuple(f.shape)) for f in found[1:]))


def _per_channel(value: Value, rank: int) -> Value:
    """A vector of one value a channel, shaped to meet dimension 1."""
    rest = (1,) * (rank - 2)
    return Value((value.shape[0], *rest), tuple(layer.reshape(-1, *rest) for layer in value.layers))


@rule(
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "upsample_bilinear2d",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest_exact2d",
    "upsample_linear1d",
    "upsample_bicubic2d",
    "_upsample_bicubic2d_aa",
    "_upsample_bilinear2d_aa",
    "upsample_trilinear3d",
    "grid_sampler",
    "grid_sampler_2d",
    "max_pool2d_with_indices",
    "_adaptive_avg_pool2d",
    "upsample",
    "max_pool1d_with_indices",
    "interpolate",
    "lp_pool2d",
)
def _positions(walk: Walk, node: Node, arguments: dict[str, Any]) -> Any:
    """What looks at positions leaves the channels alone."""
    value = next(x for x in arguments.values() if isinstance(x, Value))
    found = node.meta["val"]
    first = found if isinstance(found, torch.Tensor) else found[0]
    last = 1 if "1d" in operation(node) else 3 if "3d" in operation(node) else 2
    places = range(len(value.shape) - last, len(value.shape))
    layers = along(walk, value, places, "is a position of a pooling or resampling")
    result = walk.value(first.shape, layers)
    return result if isinstance(found, torch.Tensor) else tuple(result for _ in found)


@rule("local_response_norm")
def _neighbours(walk: Walk, node: Node, arguments: dict[str, Any]) -> Value:
    value = next(x for x in arguments.values() if isinstance(x, Value))
    return walk.value(value.shape, along(walk, value, [1], "is compared with its neighbours"))


@rule("add", "sub")
def _add(walk: Walk, node: Node, arguments: dict[str, Any]) -> Value:
    values = [x for x in arguments.values() if isinstance(x, Value)]
    residual = len(values) == 2 and not any(value.is_parameter for value in values)
    return walk.elementwise(values, node.meta["val"].shape, adds=residual and operation(node) == "add")
