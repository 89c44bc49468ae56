"""Factored layers: one linear layer or convolution as two, there and back."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from hfprune.errors import ModelError
from hfprune.structure.plan import Plan
from hfprune.structure.record import dense_path
from hfprune.weights import is_transposed_linear, scorable

_OF_INPUTS = ("in_features", "in_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_OF_OUTPUTS = ("out_features", "out_channels")
_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Factored(nn.Module):
    """A linear layer or convolution whose weight is a product: from the inputs to `rank` components, and on to the
    outputs.

    Of a convolution the first factor has the kernel, the stride and the padding; the second is 1 x 1.

    Attributes:
        factor_in: inputs to components, without a bias.
        factor_out: components to outputs, with the layer's bias.
        transposed: whether the layer's weight stands inputs x outputs, as that of GPT-2's Conv1D.
        weight: a buffer of one zero. It tells dtype and device to code that asks a layer's weight for these; and under
            its name a checkpoint holds a tensor of another size than the dense layer's, so that who knows nothing of
            factors stops there, and draws no new weights.
    """

    def __init__(self, factor_in: nn.Module, factor_out: nn.Module, transposed: bool = False):
        super().__init__()
        self.factor_in, self.factor_out, self.transposed = factor_in, factor_out, transposed
        self.register_buffer("weight", factor_in.weight.detach().new_zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor_out(self.factor_in(x))

    @property
    def rank(self) -> int:
        """How many components there are."""
        return self.factor_in.weight.shape[0]

    def product(self) -> torch.Tensor:
        """The layer's weight."""
        first, second = scorable(self.factor_in.weight), scorable(self.factor_out.weight)
        product = (second.flatten(1) @ first.flatten(1)).to(self.factor_in.weight.dtype)
        return product.t() if self.transposed else product.view(len(second), *first.shape[1:])

    @property
    def bias(self) -> nn.Parameter | None:
        """The layer's bias."""
        return self.factor_out.bias

    def __getattr__(self, name: str) -> Any:
        """What else code reads of a layer, such as its stride, is that of the factor that has it from the layer."""
        if name in _OF_INPUTS or name in _OF_OUTPUTS:
            return getattr(self.factor_in if name in _OF_INPUTS else self.factor_out, name)
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        return f"rank={self.rank}"


def can_factor(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer or convolution. Grouped and transposed convolutions are not, nor are
    classes derived from torch's, whose code may do more with the weight."""
    if module._parameters.get("weight") is None:
        return False
    if type(module) in _CONVOLUTIONS.values():
        return module.groups == 1
    return type(module) is nn.Linear or is_transposed_linear(module)


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a layer's weight as a matrix; a convolution's inputs are the places of its patch."""
    shape = module.weight.shape
    return (shape[1], shape[0]) if is_transposed_linear(module) else (shape[0], math.prod(shape[1:]))


def largest_rank(module: nn.Module) -> int:
    """The largest rank at which two factors are smaller than the one weight; may be 0."""
    rows, columns = matrix_shape(module)
    return (rows * columns - 1) // (rows + columns)


def factored_like(module: nn.Module, rank: int) -> Factored:
    """A factored layer in the place of a dense one, whose bias it takes; its weights are still to be filled.

    Raises:
        ModelError: the module is not one that can be factored, or the rank is none.
    """
    if not can_factor(module) or not 1 <= rank <= min(matrix_shape(module)):
        raise ModelError(f"{type(module).__name__} can't be factored to rank {rank}")
    weight, bias = module.weight, module.bias
    like: dict[str, Any] = {"dtype": weight.dtype, "device": "meta"}
    rows, columns = matrix_shape(module)
    if type(module) in _CONVOLUTIONS.values():
        where = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
        where["padding_mode"] = module.padding_mode
        kind = type(module)
        first = kind(module.in_channels, rank, module.kernel_size, bias=False, **where, **like)
        second = kind(rank, rows, 1, bias=bias is not None, **like)
    else:
        first = nn.Linear(columns, rank, bias=False, **like)
        second = nn.Linear(rank, rows, bias=bias is not None, **like)
    for factor in (first, second):
        empty = torch.empty(factor.weight.shape, dtype=weight.dtype, device=weight.device)
        factor.weight = nn.Parameter(empty, requires_grad=weight.requires_grad)
    second.bias = bias
    return Factored(first, second, is_transposed_linear(module)).train(module.training)


def fill(layer: Factored, left: torch.Tensor, right: torch.Tensor) -> None:
    """Gives a factored layer its values.

    Args:
        layer: takes them in its own precision.
        left: outputs x rank.
        right: rank x inputs; of a convolution place by place in the kernel, the channels of each side by side, as
            `criteria.layers.Layer` has them.
    """
    first, second = layer.factor_in.weight, layer.factor_out.weight
    with torch.no_grad():
        shape = (first.shape[0], *first.shape[2:], first.shape[1])
        first.copy_(right.reshape(shape).movedim(-1, 1))
        second.copy_(left.reshape(second.shape))


def merged(layer: Factored) -> nn.Module:
    """The dense layer whose weight is the product; its bias is the factored layer's own."""
    first, bias = layer.factor_in, layer.factor_out.bias
    value = layer.product().detach().contiguous()
    rows, columns = len(layer.factor_out.weight), first.weight.shape[1]
    if isinstance(first, nn.Linear):
        dense = _conv1d(rows, columns) if layer.transposed else nn.Linear(columns, rows, bias=False, device="meta")
    else:
        where = {"stride": first.stride, "padding": first.padding, "dilation": first.dilation}
        where["padding_mode"] = first.padding_mode
        dense = type(first)(columns, rows, first.kernel_size, bias=False, device="meta", **where)
    dense.weight = nn.Parameter(value, requires_grad=first.weight.requires_grad)
    dense.bias = bias
    return dense.train(layer.training)


def _conv1d(outputs: int, inputs: int) -> nn.Module:
    # Whoever has such a layer has transformers.
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        return Conv1D(outputs, inputs)


def factored_layers(model: nn.Module) -> dict[str, Factored]:
    """The factored layers of a model by path, those that are used in several places once."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Factored)}


def factored_ranks(model: nn.Module, plan: Plan) -> dict[str, int]:
    """The rank of every factored layer, by the path that the layer has in the dense model."""
    return {dense_path(plan, path): layer.rank for path, layer in factored_layers(model).items()}


def of_dense_layer(name: str) -> str:
    """The name that a tensor of a factored layer has in the dense one: both factors are its weight."""
    return name.replace(".factor_in.", ".").replace(".factor_out.", ".")


def put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a module in the place of another, everywhere in the model where that one stands."""
    for owner in list(model.modules()):
        for name, child in owner._modules.items():
            if child is old:
                owner._modules[name] = new
