"""What a model costs now, counted on the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn

from hfprune.errors import ModelError
from hfprune.profiling import FORWARD_FAILURES, example_batch, measure
from hfprune.structure.graph import evaluating
from hfprune.weights import is_transposed_linear


class CurrentCosts:
    """Parameters and multiply-accumulates of a model as it is at the time of asking.

    Args:
        model: any module.
        example_inputs: as for `measure`.
    """

    def __init__(self, model: nn.Module, example_inputs: Any):
        self._model, self._example_inputs = model, example_inputs

    def params(self) -> float:
        """Parameters, tied ones once."""
        return float(sum(p.numel() for p in self._model.parameters()))

    def macs(self) -> float:
        """Multiply-accumulates of one example; 0 where they can't be counted."""
        return self._macs

    @cached_property
    def _macs(self) -> float:
        return float(measure(self._model, self._example_inputs, latency=False).macs or 0)


def multiplications(model: nn.Module, layers: Mapping[str, nn.Module], example_inputs: Any) -> dict[str, float]:
    """The multiply-accumulates of dense layers for one example, by name; 0 for those that are not called.

    Raises:
        ModelError: the model can't take the inputs.
    """
    found = dict.fromkeys(layers, 0.0)
    handles = []
    for name, module in layers.items():

        def count(owner: nn.Module, args: Any, output: torch.Tensor, name: str = name) -> None:
            outputs = owner.weight.shape[1 if is_transposed_linear(owner) else 0]
            found[name] += output.numel() // outputs * owner.weight.numel()

        handles.append(module.register_forward_hook(count))
    args, kwargs = example_batch(model, example_inputs)
    try:
        with evaluating(model), torch.no_grad():
            model(*args, **kwargs)
    except FORWARD_FAILURES as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{type(model).__name__} can't take the example inputs: {line}") from error
    finally:
        for handle in handles:
            handle.remove()
    return found
