"""Layers as matrices: what a linear layer or a convolution multiplies with its weight, row by row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from hfprune.errors import ConfigError
from hfprune.weights import Weight, is_transposed_linear, scorable

CONVOLUTIONS = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}


@dataclass(frozen=True)
class Layer:
    """A weight and the module that multiplies its input with it.

    As matrices a weight has the shape (groups, rows, columns): a row is one output of one group, a column one input. A
    convolution's columns are its patches, kernel position by kernel position, the channels of each next to one another;
    a transposed convolution's rows are its output channels at every kernel position.

    Attributes:
        weight: which parameter.
        module: a linear layer, transformers' Conv1D, or a convolution.
    """

    weight: Weight
    module: nn.Module

    @property
    def name(self) -> str:
        """The weight's name."""
        return self.weight.name

    @property
    def groups(self) -> int:
        """Into how many parts the inputs and outputs are divided; 1 for linear layers."""
        return getattr(self.module, "groups", 1)

    @property
    def width(self) -> int:
        """How many inputs stand next to one another along the weight's input dimension, within one group."""
        channels = self.weight.parameter.shape[self.weight.input_dim]
        return channels // self.groups if isinstance(self.module, _ConvTransposeNd) else channels

    def to_matrices(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the weight's shape as (groups, rows, columns)."""
        if isinstance(self.module, _ConvTransposeNd):  # (inputs, outputs of a group, *kernel)
            parts = tensor.reshape(self.groups, self.width, -1)
            return parts.transpose(1, 2)
        if self.weight.input_dim == 0:
            return tensor.t()[None]
        moved = tensor.movedim(1, -1)  # (outputs, *kernel, inputs of a group)
        return moved.reshape(self.groups, moved.shape[0] // self.groups, -1)

    def from_matrices(self, matrices: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_matrices`."""
        shape = self.weight.parameter.shape
        if isinstance(self.module, _ConvTransposeNd):
            return matrices.transpose(1, 2).reshape(shape)
        if self.weight.input_dim == 0:
            return matrices[0].t()
        return matrices.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)

    def rows(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the layer sees, as (groups, positions, columns) in at least single precision.

        Args:
            inputs: what the module was called with; for linear layers any shape with the features last.
        """
        inputs = scorable(inputs.detach())
        if not isinstance(self.module, _ConvNd):
            return inputs.reshape(1, -1, inputs.shape[-1])
        dims = len(self.module.kernel_size)
        if inputs.ndim == dims + 1:
            inputs = inputs[None]
        if not isinstance(self.module, _ConvTransposeNd):
            inputs = self._patches(inputs, dims)
        batch, channels = inputs.shape[:2]
        parts = inputs.reshape(batch, self.groups, channels // self.groups, -1)
        return parts.permute(1, 0, 3, 2).reshape(self.groups, -1, channels // self.groups)

    def _patches(self, inputs: torch.Tensor, dims: int) -> torch.Tensor:
        """Every patch as channels, by a convolution with unit kernels, which knows strides, padding and dilation."""
        module, padding = self.module, self.module.padding
        if module.padding_mode != "zeros":
            inputs = nn.functional.pad(inputs, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = 0
        kernels = self._unit_kernels(inputs)
        return CONVOLUTIONS[dims](inputs, kernels, None, module.stride, padding, module.dilation, module.groups)

    def _unit_kernels(self, like: torch.Tensor) -> torch.Tensor:
        """One kernel a column, that is one where the column stands and zero elsewhere; repeated for every group."""
        kernel = tuple(self.module.kernel_size)
        columns = math.prod(kernel) * self.width
        units = torch.eye(columns, dtype=like.dtype, device=like.device).view(columns, *kernel, self.width)
        return units.movedim(-1, 1).repeat(self.groups, *[1] * (units.ndim - 1))


def layers_of(model: nn.Module, weights: dict[str, Weight], criterion: str) -> dict[str, list[Layer]]:
    """The layers of every weight, by weight name; several where modules share one parameter.

    Args:
        model: whose modules are looked through.
        weights: those to be pruned.
        criterion: its name, for the message.

    Raises:
        ConfigError: a weight whose inputs can't be seen, since no linear layer or convolution of its own takes them.
    """
    names = {id(weight.parameter): name for name, weight in weights.items()}
    found: dict[str, list[Layer]] = {}
    for module in model.modules():
        parameter = module._parameters.get("weight")
        if parameter is not None and id(parameter) in names and _is_visible(module):
            name = names[id(parameter)]
            found.setdefault(name, []).append(Layer(weights[name], module))
    for name in weights:
        if name not in found:
            path = name.rpartition(".")[0]
            owner = type(model.get_submodule(path)).__name__
            raise ConfigError(
                f"pruning.criterion: '{criterion}' looks at the inputs of linear layers and convolutions, and '{name}' "
                f"is a weight of {owner}; add '{path or name}' to pruning.ignore, or use 'l1'"
            )
    return found


def _is_visible(module: nn.Module) -> bool:
    """Whether a module is called with the very input that it multiplies; fused attention uses its output layer's weight
    without calling the layer."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    return isinstance(module, nn.Linear | _ConvNd) or is_transposed_linear(module)


def seen_by(args: tuple, kwargs: dict) -> torch.Tensor:
    """The input among the arguments that a layer was called with."""
    return args[0] if args else next(iter(kwargs.values()))
