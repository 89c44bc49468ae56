"""Proof of a removal: the small model must equal the original in which exactly the removed channels are silenced."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.fx import Interpreter, Node

from hfprune.errors import ModelError
from hfprune.structure.coupling import named_arguments
from hfprune.structure.graph import answer, main_outputs, operation
from hfprune.structure.groups import Structure
from hfprune.structure.identities import Value
from hfprune.structure.sizes import group_count, kept_along

TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-6, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_MAYBE_ROUNDING = 0.1
# What runs over the removed channels takes its statistics over the kept ones.
_STATISTICS = {"layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "mean", "var", "std", "var_mean",
               "softmax", "log_softmax", "amax", "amin", "_weight_norm", "logsumexp"}  # fmt: skip

_CHECKS = {"_assert_tensor_metadata", "_assert_async", "_assert_scalar"}


class Silenced(Interpreter):
    """Runs a graph on the original weights with the removed channels of every tensor held at zero."""

    def __init__(self, structure: Structure, gone: np.ndarray, passed_over: dict[Node, Node] | None = None):
        super().__init__(structure.graph.program.graph_module, garbage_collect_values=not passed_over)
        self.structure = structure
        self.gone = gone
        self.passed_over = passed_over or {}  # with it every result is kept: a later step takes one from far back

    def run_node(self, node: Node) -> Any:
        """One step, with what is gone silenced afterwards."""
        value = self.structure.walk.values.get(node)
        if operation(node) in _CHECKS:
            return None
        if node in self.passed_over:
            return self.env[self.passed_over[node]]
        if node.op != "call_function" or not isinstance(value, Value):
            return super().run_node(node)
        over_kept = operation(node) in _STATISTICS
        result = self._over_kept(node, value) if over_kept else super().run_node(node)
        kept = kept_along(value, self.gone)
        for dim, indices in kept.items():
            mask = torch.zeros(value.shape[dim], dtype=torch.bool)
            mask[indices] = True
            shape = [-1 if d == dim else 1 for d in range(len(value.shape))]
            result = torch.where(mask.view(shape).to(result.device), result, torch.zeros((), dtype=result.dtype))
        return result

    def _over_kept(self, node: Node, value: Value) -> torch.Tensor:
        """The step on the kept channels alone, its result spread out again."""
        walk = self.structure.walk

        def smaller(source: Node) -> Any:
            tensor, known = self.env[source], walk.values.get(source)
            if isinstance(known, Value) and isinstance(tensor, torch.Tensor):
                for dim, indices in kept_along(known, self.gone).items():
                    tensor = tensor.index_select(dim, indices.to(tensor.device))
            return tensor

        arguments = named_arguments(node, node.args, node.kwargs)
        arguments = {name: torch.fx.map_arg(given, smaller) for name, given in arguments.items()}
        first = next(x for x in arguments.values() if isinstance(x, torch.Tensor))
        if "normalized_shape" in arguments:
            arguments["normalized_shape"] = list(first.shape[-len(arguments["normalized_shape"]) :])
        for name in ("num_groups", "group"):
            if name in arguments:
                arguments[name] = group_count(walk, node, self.gone)[1]
        schema = node.target._schema
        args = [arguments[a.name] for a in schema.arguments if not a.kwarg_only and a.name in arguments]
        keywords = {a.name: arguments[a.name] for a in schema.arguments if a.kwarg_only and a.name in arguments}
        result = node.target(*args, **keywords)
        spread = result.new_zeros(value.shape)
        places = kept_along(value, self.gone)
        grid = [places.get(dim, torch.arange(size)).to(result.device) for dim, size in enumerate(value.shape)]
        return spread.index_put_(tuple(torch.meshgrid(*grid, indexing="ij")), result) if places else result


def reference(
    structure: Structure,
    gone: np.ndarray,
    passed_over: dict[Node, Node] | None = None,
    dtype: torch.dtype | None = None,
    state: dict[str, torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """The outputs of the original model with the removed channels silenced.

    Args:
        structure: its analysis.
        gone: which identities are gone, those of earlier removals included.
        passed_over: step to the earlier step whose result stands for its own, for blocks that are dropped.
        dtype: of the arithmetic; by default the model's own.
        state: what `values_of` gave; by default as the model is now.
    """
    program = structure.graph.program
    args, kwargs = structure.graph.inputs
    signature = program.graph_signature
    state = values_of(structure) if state is None else state
    given = iter(torch.utils._pytree.tree_leaves((args, kwargs)))
    placeholders: list[Any] = []
    for spec in signature.input_specs:
        name = getattr(spec.arg, "name", None)
        if name in state:
            placeholders.append(state[name])
        elif spec.target is not None and spec.target in program.constants:
            placeholders.append(program.constants[spec.target])
        else:
            placeholders.append(next(given))
    if dtype is not None:
        placeholders = _in(dtype, placeholders)
    with torch.no_grad():
        outputs = Silenced(structure, gone, passed_over).run(*placeholders)
    return [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def values_of(structure: Structure) -> dict[str, torch.Tensor]:
    """The model's tensors as its graph takes them, by placeholder: where something is gone already, zeros stand."""
    model, graph = structure.model, structure.graph
    now = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    there: dict[str, dict[int, torch.Tensor]] = {}
    for member in structure.walk.members:
        already = structure.already[member.first : member.first + member.size]
        if already.any():
            there.setdefault(member.name, {})[member.dim] = torch.from_numpy(np.flatnonzero(~already))
    state = {}
    for place, dense in graph.tensors.items():
        name = graph.names[place]
        value = now[name].detach() if name in now else dense.detach()
        for dim, indices in there.get(name, {}).items():
            shape = [*value.shape[:dim], dense.shape[dim], *value.shape[dim + 1 :]]
            value = value.new_zeros(shape).index_copy_(dim, indices.to(value.device), value)
        state[place] = value
    return state


def compare(
    structure: Structure, expected: list[torch.Tensor], exactly: Callable[[], list[torch.Tensor]] | None = None
) -> float:
    """Runs the model as it is now and compares.

    Args:
        structure: the analysis of the model before.
        expected: what `reference` gave.
        exactly: gives the reference in double precision. Where single precision leaves a difference that may be
            rounding, both are run in double precision, which tells.

    Returns:
        The largest difference, relative to the largest value of its output.

    Raises:
        ModelError: the model does not run, or differs beyond rounding.
    """
    args, kwargs = structure.graph.inputs
    found = answer(structure.model, args, kwargs)
    difference = difference_of(found, expected)
    if difference <= TOLERANCE[found[0].dtype if found else torch.float32]:
        return difference
    if exactly is not None and difference < _MAYBE_ROUNDING:
        with torch.no_grad():
            double = copy.deepcopy(structure.model).double()
            args, kwargs = _in(torch.float64, (args, kwargs))
            if difference_of(main_outputs(double(*args, **kwargs)), exactly()) <= TOLERANCE[torch.float64]:
                return difference
    raise ModelError(f"the smaller model differs from the silenced original by {difference:.1e} of its output")


def _in(dtype: torch.dtype, values: Any) -> Any:
    """Floating-point tensors in another precision."""
    return torch.utils._pytree.tree_map(
        lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, values
    )


def difference_of(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference relative to the largest value of its output; 0 where there are no values.

    Raises:
        ModelError: other outputs, or other shapes.
    """
    worst = 0.0
    if len(found) != len(expected):
        raise ModelError(f"the smaller model has {len(found)} outputs instead of {len(expected)}")
    for now, before in zip(found, expected, strict=True):
        if now.shape != before.shape:
            raise ModelError(f"an output has the shape {tuple(now.shape)} instead of {tuple(before.shape)}")
        if before.is_meta:  # without values there are shapes to compare
            continue
        scale = before.abs().max().clamp_min(1e-12)
        difference = float((now.double() - before.double()).abs().max() / scale.double())
        worst = max(worst, difference) if difference == difference else float("inf")
    return worst
