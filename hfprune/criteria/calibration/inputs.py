"""Statistics of what reaches the weights: of the inputs of linear layers and convolutions, by input channel.

Every use of a weight is seen where it happens (`torch.overrides.TorchFunctionMode`), so that a layer whose weight is
used without calling the layer counts too. All are taken over every token and position, summed in single precision, and
come in a shape that broadcasts to the weight's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hfprune.criteria.calibration.running import Calibration, accumulate, evaluated, zeros
from hfprune.weights import layer_weights

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_USES: dict[Any, tuple[str, ...]] = {
    nn.functional.linear: ("input", "weight"),
    torch.addmm: ("bias", "input", "weight"),
    torch.matmul: ("input", "weight"),
    torch.Tensor.matmul: ("input", "weight"),
    torch.Tensor.__matmul__: ("input", "weight"),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _CONVOLUTION),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), _TRANSPOSED),
}
"""Operations that contract an input with a weight, with the names of their arguments."""


@dataclass(frozen=True)
class Use:
    """One use of a weight.

    Attributes:
        name: the weight's.
        layer: the module that owns it.
        input: what it is contracted with; channels last for linear layers, before the positions for convolutions.
        options: of a convolution: stride, padding, dilation.
        output: the result's shape.
    """

    name: str
    layer: nn.Module
    input: torch.Tensor
    options: dict[str, Any]
    output: torch.Size

    @property
    def is_convolution(self) -> bool:
        """Whether the input has positions behind its channels."""
        return isinstance(self.layer, nn.modules.conv._ConvNd)

    @property
    def positions(self) -> tuple[int, ...]:
        """The dimensions of the input beside its channels."""
        channel = self.input.ndim - 1 - (len(self.layer.kernel_size) if self.is_convolution else 0)
        return tuple(d for d in range(self.input.ndim) if d != channel)

    @property
    def count(self) -> int:
        """How many positions there are."""
        return self.input.numel() // max(1, channels_of(self.layer))

    def by_channel(self) -> torch.Tensor:
        """The input as a matrix: positions x channels."""
        channel = next(d for d in range(self.input.ndim) if d not in self.positions)
        return self.input.movedim(channel, -1).flatten(0, -2)


class _Watch(TorchFunctionMode):
    """Tells of every use of some weights."""

    def __init__(self, layers: dict[str, nn.Module], tell: Callable[[Use], None]):
        super().__init__()
        self.names = {id(layer.weight): name for name, layer in layers.items()}
        self.layers, self.tell = layers, tell

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _USES:
            given = dict(zip(_USES[func], args, strict=False)) | _renamed(kwargs or {})
            name = self.names.get(id(given.get("weight")))
            if name is not None and given["input"].numel():
                self.tell(Use(name, self.layers[name], given["input"].detach(), given, result.shape))
        return result


def _renamed(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of matrix products under the names that `_USES` gives them."""
    return {
        {"mat1": "input", "mat2": "weight", "other": "weight"}.get(key, key): value for key, value in kwargs.items()
    }


def channels_of(layer: nn.Module) -> int:
    """How many channels a layer takes."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return layer.in_channels
    return layer.in_features if isinstance(layer, nn.Linear) else layer.weight.shape[0]


def spread(layer: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """Values by input channel, and for convolutions maybe by place in the kernel, in a shape like the weight's."""
    if isinstance(layer, nn.Linear):
        return values[None]
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return values[:, None]
    kernel = values.shape[1:] or (1,) * len(layer.kernel_size)
    if layer.transposed:
        return values.reshape(-1, 1, *kernel)
    if layer.groups == 1:
        return values.reshape(1, -1, *kernel)
    by_group = values.reshape(layer.groups, -1, *kernel)
    return by_group.repeat_interleave(layer.out_channels // layer.groups, 0)


def input_norm(calibration: Calibration) -> dict[str, torch.Tensor]:
    """||x_j||₂ over all tokens (Sun 2023, arXiv 2306.11695); of convolutions over patches, by place in the kernel."""
    sums, seen = _sums(calibration, _squares, by_place=True)
    return {name: spread(layer, sums[name].sqrt()) for name, layer in seen.items()}


def mean_activation(calibration: Calibration) -> dict[str, torch.Tensor]:
    """The mean of |x_j| over all tokens and positions."""
    return _means(calibration, lambda use: use.input.abs().sum(use.positions, dtype=_wide(use.input)))


def active_fraction(calibration: Calibration) -> dict[str, torch.Tensor]:
    """The fraction of tokens and positions at which x_j is above zero."""
    return _means(calibration, lambda use: (use.input > 0).sum(use.positions))


def activation_entropy(calibration: Calibration, bins: int) -> dict[str, torch.Tensor]:
    """The entropy, in nats, of every channel's values in a histogram between its least and its largest one.

    The batches are run twice: for the bounds, then for the histogram.
    """
    layers, device = _layers(calibration), calibration.device
    bounds = {n: zeros((2, channels_of(m)), m.weight).fill_(-torch.inf) for n, m in layers.items()}

    def widen(use: Use) -> None:
        values = use.input.to(bounds[use.name].dtype)
        found = torch.stack([-values.amin(use.positions), values.amax(use.positions)])
        torch.maximum(bounds[use.name], found, out=bounds[use.name])

    def count(use: Use) -> None:
        low, high = -bounds[use.name][0], bounds[use.name][1]
        values = use.by_channel().to(low.dtype)
        places = ((values - low) * (bins / (high - low).clamp_min(1e-30))).long().clamp_(0, bins - 1)
        places += torch.arange(len(low), device=device) * bins
        histograms[use.name] += torch.bincount(places.flatten(), minlength=len(low) * bins).view(-1, bins)

    _run(calibration, layers, widen, largest=bounds.values())
    histograms = {n: torch.zeros(channels_of(m), bins, device=device) for n, m in layers.items()}
    _run(calibration, layers, count, sums=histograms.values())
    found = {}
    for name, layer in layers.items():
        if histograms[name].any():
            shares = histograms[name] / histograms[name].sum(1, keepdim=True)
            found[name] = spread(layer, torch.special.entr(shares).sum(1))
    return found


def _means(calibration: Calibration, add: Callable[[Use], torch.Tensor]) -> dict[str, torch.Tensor]:
    sums, seen = _sums(calibration, add, counted=True)
    return {name: spread(layer, sums[name][:-1] / sums[name][-1]) for name, layer in seen.items()}


def _sums(
    calibration: Calibration, add: Callable[[Use], torch.Tensor], *, by_place: bool = False, counted: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, nn.Module]]:
    """Sums over all uses of every weight, and the layers that ran; `counted` puts the number of positions last."""
    layers = _layers(calibration)
    sums, ran = {}, torch.zeros(len(layers), device=calibration.device)
    for name, layer in layers.items():
        kernel = getattr(layer, "kernel_size", ()) if by_place else ()
        sums[name] = zeros((channels_of(layer) + counted, *kernel), layer.weight)
    order = {name: index for index, name in enumerate(layers)}

    def tell(use: Use) -> None:
        total = sums[use.name]
        found = add(use).to(total.dtype)
        if counted:
            total[-1] += use.count
            total = total[:-1]
        total += found
        ran[order[use.name]] = 1

    _run(calibration, layers, tell, sums=[*sums.values(), ran])
    return sums, {name: layer for (name, layer), r in zip(layers.items(), ran.tolist(), strict=True) if r}


def _layers(calibration: Calibration) -> dict[str, nn.Module]:
    known = layer_weights(calibration.model)
    return {name: known[name][0] for name in calibration.weights if name in known}


def _run(
    calibration: Calibration,
    layers: dict[str, nn.Module],
    tell: Callable[[Use], None],
    sums: Iterable[torch.Tensor] = (),
    largest: Iterable[torch.Tensor] = (),
) -> None:
    def add(batch: Any, number: int) -> int:
        with _Watch(layers, tell):
            calibration.forward(batch)
        return 1

    with evaluated(calibration.model), torch.no_grad():
        accumulate(calibration, "activations", add, sums, largest)


def _wide(values: torch.Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _squares(use: Use) -> torch.Tensor:
    """Σ x² by input channel and place in the kernel."""
    squares = use.input.to(_wide(use.input)).square()
    if not use.is_convolution:
        return squares.sum(use.positions)
    size = len(use.layer.kernel_size)
    if squares.ndim == size + 2:
        squares = squares.sum(0)
    found = torch.empty(use.layer.in_channels, *use.layer.kernel_size, dtype=squares.dtype, device=squares.device)
    for place in itertools.product(*(range(n) for n in use.layer.kernel_size)):
        met = tuple(_met(use, d, place[d], squares.shape[1 + d], use.output[d - size]) for d in range(size))
        found[(slice(None), *place)] = squares[(slice(None), *met)].flatten(1).sum(1)
    return found


def _met(use: Use, dim: int, place: int, length: int, results: int) -> slice:
    """The input positions that a place of the kernel meets along one dimension; padding adds nothing."""
    stride, dilation = _along(use, "stride", dim, 1), _along(use, "dilation", dim, 1)
    padding = _padding(use, dim, dilation)
    offset = place * dilation - padding
    if use.layer.transposed:  # input p adds to the result p * stride + offset, where there is such a one
        first = max(0, -(offset // stride))
        last = min(length - 1, (results - 1 - offset) // stride)
        return slice(first, max(first, last + 1))
    first = max(0, -(offset // stride))  # result q takes the input q * stride + offset
    last = min(results - 1, (length - 1 - offset) // stride)
    start = first * stride + offset
    return slice(start, max(start, last * stride + offset + 1), stride)


def _padding(use: Use, dim: int, dilation: int) -> int:
    padding = use.options.get("padding", 0)
    if padding == "valid":
        return 0
    if padding == "same":  # an odd one more stands behind
        return dilation * (use.layer.kernel_size[dim] - 1) // 2
    return _along(use, "padding", dim, 0)


def _along(use: Use, name: str, dim: int, default: int) -> int:
    value = use.options.get(name, default)
    return value if isinstance(value, int) else value[dim if len(value) > 1 else 0]
