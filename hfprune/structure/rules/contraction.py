"""Matrix products of every kind, as one rule over named dimensions."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.fx import Node

from hfprune.structure.coupling import MISMATCH, Product, Walk, rule
from hfprune.structure.graph import module_path
from hfprune.structure.identities import Value, axes, compact, reduced


class _Operand:
    """A value with a label for each of its dimensions of more than one element, and its layers by their labels."""

    def __init__(self, value: Value, labels: str):
        self.value = value
        self.labels = {labels[d]: d for d, size in enumerate(value.shape) if size > 1}
        self.layers = {frozenset(labels[d] for d in axes(layer)): layer for layer in value.layers}

    def dims(self, labels: Any) -> list[int]:
        return [self.labels[label] for label in labels if label in self.labels]


def contract(walk: Walk, node: Node, first: tuple[Value, str], second: tuple[Value, str], out: str) -> Value:
    """The product of two tensors, summed over the labels that `out` lacks.

    A summed dimension is cut in both alike. Where it varies together with a dimension that both share and the result
    keeps, as attention does over its heads, the unit is the whole slice: the head.
    """
    left, right = _Operand(*first), _Operand(*second)
    shared = left.labels.keys() & right.labels.keys()
    summed, batch = {label for label in shared if label not in out}, {label for label in shared if label in out}
    for operand in (left, right):
        _settle_sums(walk, operand, summed, batch)
    for operand, other in ((left, right), (right, left)):
        _settle_slices(walk, operand, other, batch)
    found: dict[frozenset[str], torch.Tensor] = {}
    for operand, other in ((left, right), (right, left)):
        for labels, layer in operand.layers.items():
            flat = _by_labels(operand, labels, layer)
            if labels & shared and labels not in other.layers:
                walk.protect(layer, "meets something of fixed size")
            elif labels in found:
                found[labels] = walk.unite(found[labels], flat)
            else:
                found[labels] = flat
            if labels <= batch and not (walk.even_heads or left.value.is_parameter or right.value.is_parameter):
                walk.mark_heads(layer)
    sizes = {label: o.value.shape[d] for o in (left, right) for label, d in o.labels.items()}
    _count(walk, node, sizes, found)
    shape = tuple(node.meta["val"].shape)
    layers = []
    for labels, flat in found.items():
        if labels <= set(out):
            order = sorted(labels)
            places = [out.index(label) for label in order]
            layer = flat.permute([order.index(out[p]) for p in sorted(places)])
            layers.append(layer.reshape([shape[d] if d in places else 1 for d in range(len(shape))]))
    return walk.value(shape, layers)


def _settle_sums(walk: Walk, operand: _Operand, summed: set[str], batch: set[str]) -> None:
    """Layers that vary along a summed dimension and along others."""
    for labels in [key for key in operand.layers if key & summed and key - summed]:
        layer = operand.layers.pop(labels)
        if labels & batch:
            keep = labels & (summed if walk.even_heads else batch)
            layer = walk.collapse(layer, operand.dims(labels - keep))
            walk.mark_heads(layer)
        else:  # a product with what all slices share: the slices stay apart until something settles it
            walk.defer_collapse(MISMATCH, layer, operand.dims(labels & summed))
            keep = labels - summed
            layer = compact(reduced(layer, operand.dims(summed)))
        operand.layers[keep] = layer


def _settle_slices(walk: Walk, operand: _Operand, other: _Operand, batch: set[str]) -> None:
    """Layers that vary along a shared dimension and one of their own, as attention's values do."""
    for labels in [key for key in operand.layers if key & batch and key - batch]:
        layer = operand.layers.pop(labels)
        slices = labels & batch in other.layers and not walk.even_heads
        keep = labels & batch if slices else labels - batch
        operand.layers[keep] = walk.collapse(layer, operand.dims(labels - keep))
        if walk.even_heads:
            walk.mark_heads(operand.layers[keep])


def _by_labels(operand: _Operand, labels: frozenset[str], layer: torch.Tensor) -> torch.Tensor:
    """The layer with one dimension a label, in alphabetical order."""
    dims = [operand.labels[label] for label in sorted(labels)]
    rest = [d for d in range(layer.ndim) if d not in dims]
    return layer.permute(dims + rest).reshape([layer.shape[d] for d in dims])


def _count(walk: Walk, node: Node, sizes: dict[str, int], found: dict[frozenset[str], torch.Tensor]) -> None:
    """Notes the multiplications: the product of all sizes, each cut by the identities along it."""
    factors = [layer.flatten() for labels, layer in found.items() if len(labels) == 1]
    constant = prod(size for label, size in sizes.items() if frozenset(label) not in found)
    walk.products.append(Product(module_path(node), constant, factors))


@rule("linear")
def _linear(walk: Walk, node: Node, arguments: dict[str, Any]) -> Value:
    value, weight, bias = arguments["input"], arguments["weight"], arguments["bias"]
    rest = "abcdefg"[: len(value.shape) - 1]
    out = rest + ("o" if len(weight.shape) > 1 else "")
    result = contract(walk, node, (value, rest + "i"), (weight, "oi" if len(weight.shape) > 1 else "i"), out)
    return result if bias is None else walk.elementwise([result, bias], result.shape)


@rule("matmul", "bmm", "mm", "mv", "dot", "inner")
def _matmul(walk: Walk, node: Node, arguments: dict[str, Any]) -> Value:
    left, right = [x for x in arguments.values() if isinstance(x, Value)][:2]
    return matmul(walk, node, left, right)


def matmul(walk: Walk, node: Node, left: Value, right: Value) -> Value:
    """torch.matmul's conventions: leading dimensions are shared, vectors have no row or column."""
    rank = max(len(left.shape), len(right.shape)) - 2
    batch = "abcdefg"[: max(rank, 0)]
    of_left = "k" if len(left.shape) == 1 else batch[max(0, rank - len(left.shape) + 2) :] + "mk"
    of_right = "k" if len(right.shape) == 1 else batch[max(0, rank - len(right.shape) + 2) :] + "kn"
    out = batch + ("m" if "m" in of_left else "") + ("n" if "n" in of_right else "")
    return contract(walk, node, (left, of_left), (right, of_right), out)


@rule("addmm", "baddbmm", "addbmm")
def _addmm(walk: Walk, node: Node, arguments: dict[str, Any]) -> Value:
    bias, left, right = [x for x in arguments.values() if isinstance(x, Value)][:3]
    result = matmul(walk, node, left, right)
    return walk.elementwise([result, bias], result.shape)


@rule("einsum")
def _einsum(walk: Walk, node: Node, arguments: dict[str, Any]) -> Any:
    values = [x for x in arguments["tensors"] if isinstance(x, Value)]
    terms, _, out = arguments["equation"].replace(" ", "").partition("->")
    labels = terms.split(",")
    if (
        len(values) != 2
        or "->" not in arguments["equation"]
        or "." in terms
        or any(len(set(term)) != len(term) for term in labels)
    ):
        return walk.follow_no_further(node, arguments)
    return contract(walk, node, (values[0], labels[0]), (values[1], labels[1]), out)


@rule("scaled_dot_product_attention")
def _attention(walk: Walk, node: Node, arguments: dict[str, Any]) -> Value:
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    repeats = query.shape[-3] // key.shape[-3] if len(query.shape) > 2 and key.shape[-3] else 1
    if repeats > 1:
        key, value = (_repeat_heads(walk, tensor, repeats) for tensor in (key, value))
    batch = "abcdefg"[: len(query.shape) - 2]
    scores_shape = (*query.shape[:-1], key.shape[-2])
    scores = contract(walk, _Shaped(node, scores_shape), (query, batch + "qk"), (key, batch + "sk"), batch + "qs")
    mask = arguments.get("attn_mask")
    if isinstance(mask, Value):
        scores = walk.elementwise([scores, mask], scores_shape)
    return contract(walk, node, (scores, batch + "qs"), (value, batch + "sv"), batch + "qv")


class _Shaped:
    """A step whose inner result has another shape than the step itself."""

    def __init__(self, node: Node, shape: tuple[int, ...]):
        self.meta = {**node.meta, "val": torch.empty(shape, device="meta")}


def _repeat_heads(walk: Walk, value: Value, repeats: int) -> Value:
    """Every key and value head stands for a group of query heads."""
    dim = len(value.shape) - 3
    shape = (*value.shape[:dim], value.shape[dim] * repeats, *value.shape[dim + 1 :])
    layers = [layer.repeat_interleave(repeats, dim) if dim in axes(layer) else layer for layer in value.layers]
    return walk.value(shape, layers)


@rule("grouped_mm_fallback", "_grouped_mm", "grouped_mm")
def _grouped_mm(walk: Walk, node: Node, arguments: dict[str, Any]) -> Value:
    """Every row by the matrix of its expert."""
    tokens, experts = [x for x in arguments.values() if isinstance(x, Value)][:2]
    for layer in experts.layers:
        if axes(layer) == {0}:
            walk.protect(layer, "is an expert")
    return contract(walk, node, (tokens, "mk"), (experts, "ekn"), "mn")


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(walk: Walk, node: Node, arguments: dict[str, Any]) -> Any:
    """Counted, but not followed: the state meets itself from step to step."""
    positions = prod(arguments["input"].shape[:-1])
    weights = [prod(value.shape) for value in arguments["params"] if isinstance(value, Value) and len(value.shape) > 1]
    walk.products.append(Product(module_path(node), positions * sum(weights), []))
    return walk.follow_no_further(node, arguments)
