"""The walk: channel identities carried through a graph, until nothing more is found equal.

A pass visits every step once and unites identities that must be equal. What is clear is united at once; what can be
resolved in several ways (`defer`) waits until a pass brings nothing new, since attention settles most of it: units of
a tensor that varies along two dimensions are whole slices. The last pass changes nothing and notes what can't be cut.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from hfprune.structure.graph import Graph, module_path, operation, source_line
from hfprune.structure.identities import Partition, Value, axes, compact, reduced

MISMATCH, EVEN_PARTS, GRID = range(3)
"""What is deferred, in the order in which it is resolved: operands that meet along different dimensions, equal parts
of a split, and tensors that still vary along several dimensions."""

_POINTWISE = ("hardswish", "hardsigmoid", "hardtanh", "relu6", "selu", "celu", "mish", "logsigmoid", "softplus")
PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention", "conv1d",
            "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")  # fmt: skip
"""Operations that are counted, whether anything in them can be cut or not."""

FACTORIES = ("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
"""Operations that make a constant of a given size."""

_PASSES = 30
_LARGEST_CONSTANT = 1 << 20

Rule = Callable[["Walk", Node, dict[str, Any]], Any]
rules: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enters a function as the rule of these ATen operations."""

    def enter(function: Rule) -> Rule:
        for name in names:
            rules[name] = function
        return function

    return enter


@dataclass
class Member:
    """One dimension of a parameter or buffer, whose identities are `first ... first + size - 1`."""

    name: str
    dim: int
    first: int
    size: int


@dataclass
class Product:
    """The multiplications of one step: `constant` times the number of kept identities of each factor."""

    module: str
    constant: int
    factors: list[torch.Tensor] = field(default_factory=list)


class Walk:
    """The identities of a graph.

    Args:
        graph: an exported model.
        kernels: names of convolution weights, whose dimensions from the third on are no channels.
        even_heads: resolve attention into cuts of the head dimension, alike in all heads, instead of whole heads.

    Attributes:
        partition: which identities are equal.
        members: every dimension of every parameter and buffer, once for tied ones.
        values: after `run`, what is known of the result of each step.
        protected: identity to the reason why it can't be cut.
        unknown: operations that could not be followed, with where they stand.
        heads, residual: identities that attention runs over, and those that a residual sum has joined.
        products: the multiplications of every step.
    """

    def __init__(self, graph: Graph, kernels: Iterable[str] = (), even_heads: bool = False):
        self.graph = graph
        self._kernels = set(kernels)
        self.even_heads = even_heads
        self.partition = Partition()
        self.members: list[Member] = []
        self.values: dict[Node, Any] = {}
        self.protected: dict[int, str] = {}
        self.unknown: dict[str, str] = {}
        self.heads: list[torch.Tensor] = []
        self.residual: list[torch.Tensor] = []
        self.products: list[Product] = []
        self._final = False
        self._first = True
        self._node: Node | None = None
        self._deferred: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        self._own: dict[int, Value] = {}
        self._head_counts: set[int] = set()
        self._factories: dict[Node, list[torch.Tensor]] = {}
        for place, tensor in graph.tensors.items():
            if id(tensor) not in self._own:
                self._own[id(tensor)] = self._fresh(graph.names[place], tensor)

    def run(self) -> Walk:
        """Passes until nothing changes, then the last one."""
        for _ in range(_PASSES):
            before = self.partition.changes
            self._pass()
            self._first = False
            if self.partition.changes == before:
                for kind in (MISMATCH, EVEN_PARTS, GRID):
                    for left, right in self._deferred[kind]:
                        self.partition.union(left, right)
                    if self.partition.changes != before:
                        break
                else:
                    break
        self._final = True
        self._pass()
        return self

    # -- what rules use ------------------------------------------------------------------------------------------------

    @property
    def is_first(self) -> bool:
        """Whether this is the first pass, in which operands still have the identities that they were made with."""
        return self._first

    def value(self, shape: Sequence[int], layers: Iterable[torch.Tensor], **more: Any) -> Value:
        """A value in normal form: representatives, compact; what does not vary at all can't be cut."""
        kept: dict[frozenset[int], torch.Tensor] = {}
        for layer in layers:
            layer = compact(self.partition.find(compact(layer)))
            varies = axes(layer)
            if not varies:
                self.protect(layer, "is a single unit")
            elif varies in kept:
                self.protect(layer, "meets another direction in one dimension")
                self.protect(kept[varies], "meets another direction in one dimension")
            else:
                kept[varies] = layer
                if len(varies) > 1:
                    self._defer_grid(layer)
        return Value(tuple(shape), tuple(kept.values()), **more)

    def protect(self, identities: torch.Tensor, reason: str) -> None:
        """Notes in the last pass that these can't be cut, with the present step as the place."""
        if not self._final or self._node is None:
            return
        new = [i for i in torch.unique(self.partition.find(identities)).tolist() if i and i not in self.protected]
        if new:
            where = " in ".join(part for part in (operation(self._node), module_path(self._node)) if part)
            line = source_line(self._node)
            text = f"{reason} ({where}{', ' + line if line else ''})"
            self.protected.update(dict.fromkeys(new, text))

    def unite(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Makes two layers equal; where one has nothing the other can't be cut. The result holds both."""
        left, right = torch.broadcast_tensors(left, right)
        self.partition.union(left, right)
        one_sided = (left == 0) != (right == 0)
        if bool(one_sided.any()):
            self.protect(torch.maximum(left, right)[one_sided], "meets something of fixed size")
        return self.partition.find(torch.maximum(left, right))

    def collapse(self, layer: torch.Tensor, dims: Iterable[int]) -> torch.Tensor:
        """Unites a layer along dimensions, which it then no longer varies along."""
        dims = [dim for dim in dims if layer.shape[dim] > 1]
        if not dims:
            return layer
        whole = layer.amax(dims, keepdim=True)
        self.partition.union(whole, layer)
        partly = whole.expand_as(layer)[layer == 0]
        if len(partly):
            self.protect(partly, "is partly of fixed size")
        return compact(self.partition.find(whole))

    def defer(self, kind: int, left: torch.Tensor, right: torch.Tensor) -> None:
        """Keeps a union for when nothing clearer is left."""
        self._deferred[kind].append((left, right))

    def defer_collapse(self, kind: int, layer: torch.Tensor, keep: Iterable[int]) -> None:
        """Keeps for later: the layer is to vary along `keep` alone; of heads whole slices are taken instead."""
        keep = set(keep)
        drop = axes(layer) - keep
        if kind == MISMATCH and keep and drop and self.is_head(layer) and not self.even_heads:
            drop = keep
        self.defer(kind, reduced(layer, drop), layer)

    def mark_heads(self, layer: torch.Tensor) -> None:
        """Notes that attention runs over these."""
        self.heads.append(torch.unique(layer))
        self._head_counts.add(layer.numel())

    def is_head(self, layer: torch.Tensor) -> bool:
        """Whether attention has been found to run over any of these."""
        if not self.heads:
            return False
        heads = self.partition.find(torch.cat(self.heads))
        return bool(torch.isin(self.partition.find(torch.unique(layer)), heads).any())

    def elementwise(self, values: Sequence[Value], shape: Sequence[int], adds: bool = False) -> Value:
        """The result of an operation on equal positions: identities that meet are equal."""
        rank = len(shape)
        layers: list[dict[frozenset[int], torch.Tensor]] = []
        for value in values:
            lifted = [layer.reshape((1,) * (rank - layer.ndim) + tuple(layer.shape)) for layer in value.layers]
            layers.append({axes(layer): layer for layer in lifted})
        sizes = [(1,) * (rank - len(value.shape)) + value.shape for value in values]
        result: dict[frozenset[int], torch.Tensor] = {}
        for varies in dict.fromkeys(key for own in layers for key in own):
            for own in layers:
                if varies in own:
                    if varies in result and adds and self._first:
                        self.residual.append(self.partition.union(result[varies], own[varies]).flatten())
                    result[varies] = self.unite(result[varies], own[varies]) if varies in result else own[varies]
            for own, size in zip(layers, sizes, strict=True):
                if varies in own:
                    continue
                overlapping = [key for key in own if key & varies]
                for key in overlapping:
                    self.defer_collapse(MISMATCH, own[key], key & varies)
                    self.defer_collapse(MISMATCH, result[varies], key & varies)
                    common = key & varies
                    self.defer(MISMATCH, reduced(own[key], key - common), reduced(result[varies], varies - common))
                if not overlapping and any(size[dim] > 1 for dim in varies):
                    self.protect(result[varies], "meets something of fixed size")
        largest = {k: layer for k, layer in result.items() if not any(k < other for other in result)}
        return self.value(shape, largest.values())

    # -- one pass ------------------------------------------------------------------------------------------------------

    def _fresh(self, name: str, tensor: torch.Tensor) -> Value:
        layers = []
        for dim, size in enumerate(tensor.shape):
            if size > 1 and tensor.is_floating_point() and not (dim > 1 and name in self._kernels):
                identities = self.partition.fresh(size)
                self.members.append(Member(name, dim, int(identities[0]), size))
                layers.append(identities.view([size if d == dim else 1 for d in range(tensor.ndim)]))
        constant = None if tensor.is_floating_point() or tensor.is_meta else tensor
        return Value(tuple(tensor.shape), tuple(layers), constant, is_parameter=True)

    def _pass(self) -> None:
        self.values, self.products = {}, []
        self._deferred = defaultdict(list)
        for node in self.graph.nodes:
            self._node = node
            if node.op == "placeholder":
                self.values[node] = self._placeholder(node)
            elif node.op == "get_attr":
                self.values[node] = self._constant(node)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                for value in self._values_in(self._known(node.args)):
                    for layer in value.layers:
                        self.protect(layer, "reaches the model's output")

    def _placeholder(self, node: Node) -> Any:
        tensor = self.graph.tensors.get(node.name)
        if tensor is not None:
            own = self._own[id(tensor)]
            return self.value(own.shape, own.layers, constant=own.constant, is_parameter=True)
        found = node.meta.get("val")
        constant = self.graph.program.constants.get(
            self.graph.program.graph_signature.inputs_to_lifted_tensor_constants.get(node.name, "")
        )
        if isinstance(constant, torch.Tensor) and not (constant.is_meta or constant.is_floating_point()):
            return Value(tuple(constant.shape), constant=constant)
        return _plain(found)

    def _constant(self, node: Node) -> Any:
        owner: Any = self.graph.program.graph_module
        for part in node.target.split("."):
            owner = getattr(owner, part, None)
        if isinstance(owner, torch.Tensor):
            small = owner.numel() <= _LARGEST_CONSTANT and not owner.is_floating_point() and not owner.is_meta
            return Value(tuple(owner.shape), constant=owner if small else None)
        return owner

    def _known(self, args: Any) -> Any:
        return torch.fx.map_arg(args, lambda node: self.values.get(node))

    def _values_in(self, args: Any) -> list[Value]:
        return [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Value)]

    def _call(self, node: Node) -> None:
        if node.target is operator.getitem:
            source, index = self._known(node.args)
            self.values[node] = source[index] if isinstance(source, tuple | list) else _plain(node.meta.get("val"))
            return
        name = operation(node)
        arguments = named_arguments(node, self._known(node.args), self._known(node.kwargs))
        inputs = self._values_in(arguments)
        function = rules.get(name)
        if name in FACTORIES and isinstance(node.meta.get("val"), torch.Tensor):
            result = self._made(node)
        elif not any(value.layers for value in inputs) and name not in PRODUCTS:
            result = self._evaluate(node, arguments, inputs)
        elif function is not None:
            result = function(self, node, arguments)
        elif torch.Tag.pointwise in getattr(node.target, "tags", ()) or name in _POINTWISE:
            result = self.elementwise(inputs, node.meta["val"].shape)
        else:
            result = self.follow_no_further(node, arguments)
        self.values[node] = result
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.name.endswith("_") and isinstance(result, Value) and node.args:
            first = node.args[0]
            if isinstance(first, Node) and isinstance(self.values.get(first), Value):
                self.values[first] = result  # an operation in place changes what later steps read

    def _made(self, node: Node) -> Value:
        """A constant that the code makes in a size of its own: it can be made smaller wherever it meets what is cut."""
        found = node.meta["val"]
        if not found.is_floating_point():
            return _plain(found)
        if node not in self._factories:
            self._factories[node] = [
                self.partition.fresh(size).view([size if d == dim else 1 for d in range(found.ndim)])
                for dim, size in enumerate(found.shape)
                if size > 1
            ]
        return self.value(found.shape, self._factories[node])

    def _evaluate(self, node: Node, arguments: dict[str, Any], inputs: list[Value]) -> Any:
        """Nothing varies here: at most an index that later steps look up is computed."""
        found = node.meta.get("val")
        small = isinstance(found, torch.Tensor) and not found.is_floating_point() and found.numel() < _LARGEST_CONSTANT
        if small and inputs and all(value.constant is not None for value in inputs):
            given = torch.utils._pytree.tree_map(
                lambda x: x.constant if isinstance(x, Value) else x, (self._known(node.args), self._known(node.kwargs))
            )
            try:
                return Value(tuple(found.shape), constant=node.target(*given[0], **given[1]))
            except (RuntimeError, TypeError, NotImplementedError):
                return _plain(found)
        return _plain(found)

    def follow_no_further(self, node: Node, arguments: dict[str, Any]) -> Any:
        """An operation that nothing is known of: what goes in can't be cut."""
        for value in self._values_in(arguments):
            for layer in value.layers:
                self.protect(layer, f"'{operation(node)}' is not followed")
                self.unknown.setdefault(operation(node), f"{module_path(node)} {source_line(node)}".strip())
        return _plain(node.meta.get("val"))

    def _defer_grid(self, layer: torch.Tensor) -> None:
        """A tensor that varies along several dimensions: by default even cuts along the largest of them, or the one
        that counts heads."""
        largest = max(axes(layer), key=lambda dim: (layer.shape[dim] in self._head_counts, layer.shape[dim], dim))
        self.defer_collapse(GRID, layer, [largest])


def _plain(found: Any) -> Any:
    """Values without identities, in the structure of an operation's result."""
    if isinstance(found, torch.Tensor):
        return Value(tuple(found.shape))
    if isinstance(found, tuple | list):
        return tuple(_plain(item) for item in found)
    return found


def named_arguments(node: Node, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a step by the names of its schema, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(i): value for i, value in enumerate(args)} | dict(kwargs)
    named = {}
    for position, argument in enumerate(schema.arguments):
        if position < len(args):
            named[argument.name] = args[position]
        elif argument.name in kwargs:
            named[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            named[argument.name] = argument.default_value
    return named
