"""What a model costs now, counted on the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn

from hfprune.errors import ModelError
from hfprune.lowrank.factor import put
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


class _Probe(nn.Module):
    """Stands in a layer's place for one forward pass, and sees what is done with it.

    Attributes:
        macs: multiply-accumulates of its calls.
        read: whether the model's code computes with its weight instead of calling it.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.macs, self.read = layer, 0.0, False

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = self.layer(*args, **kwargs)
        outputs = self.layer.weight.shape[1 if is_transposed_linear(self.layer) else 0]
        self.macs += output.numel() // outputs * self.layer.weight.numel()
        return output

    @property
    def weight(self) -> torch.Tensor:
        weight = self.layer.weight.detach().as_subclass(_Watched)
        weight.probe = self
        return weight

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)


class _Watched(torch.Tensor):
    """A weight that says when it is used for more than its dtype or device."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func not in _OF_NO_VALUES:
            for value in torch.utils._pytree.tree_leaves((args, kwargs)):
                if isinstance(value, cls):
                    value.probe.read = True
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


_OF_NO_VALUES = {getattr(torch.Tensor, name).__get__ for name in ("dtype", "device", "requires_grad")}
_OF_NO_VALUES |= {torch.Tensor.is_floating_point}


def multiplications(model: nn.Module, layers: Mapping[str, nn.Module], example_inputs: Any) -> dict[str, float]:
    """The multiply-accumulates of dense layers for one example, by name; 0 for those that are not called. Left out are
    layers whose weight the model's code takes for itself, for more than its dtype: a factored layer has none.

    Raises:
        ModelError: the model can't take the inputs.
    """
    probes = {name: _Probe(module).train(module.training) for name, module in layers.items()}
    args, kwargs = example_batch(model, example_inputs)
    try:
        for probe in probes.values():
            put(model, probe.layer, probe)
        with evaluating(model), torch.no_grad():
            model(*args, **kwargs)
    except FORWARD_FAILURES as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{type(model).__name__} can't take the example inputs: {line}") from error
    finally:
        for probe in probes.values():
            put(model, probe, probe.layer)
    return {name: probe.macs for name, probe in probes.items() if not probe.read}
