"""Proof of a factoring: the model must equal itself with every factored layer as one whose weight is the product."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from hfprune.errors import ModelError
from hfprune.lowrank.factor import factored_layers, merged, put
from hfprune.profiling import FORWARD_FAILURES, example_batch
from hfprune.structure.graph import evaluating, main_outputs
from hfprune.structure.proof import TOLERANCE, difference_of


def prove(model: nn.Module, example_inputs: Any) -> float:
    """Runs the model with its factors and with their products.

    Args:
        model: left as it was.
        example_inputs: as for `measure`.

    Returns:
        The largest difference, relative to the largest value of its output.

    Raises:
        ModelError: the model does not run, or differs beyond rounding.
    """
    inputs = example_batch(model, example_inputs)
    try:
        found = _compare(model, inputs)
        kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        # In double precision what is left is no rounding.
        if found > TOLERANCE.get(kind, 0.0):
            double = copy.deepcopy(model).double()
            exact = _compare(double, example_batch(double, inputs[1] or inputs[0]))
            if exact > TOLERANCE[torch.float64]:
                raise ModelError(f"the factored model differs from that of the products by {exact:.1e} of its output")
    except FORWARD_FAILURES as error:
        if isinstance(error, ModelError):
            raise
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"the factored {type(model).__name__} does not run: {line}") from error
    return found


def _compare(model: nn.Module, inputs: tuple[tuple, dict[str, Any]]) -> float:
    args, kwargs = inputs
    products = {layer: merged(layer) for layer in factored_layers(model).values()}
    with evaluating(model), torch.no_grad():
        found = main_outputs(model(*args, **kwargs))
        try:
            for layer, product in products.items():
                put(model, layer, product)
            return difference_of(found, main_outputs(model.eval()(*args, **kwargs)))
        finally:
            for layer, product in products.items():
                put(model, product, layer)
