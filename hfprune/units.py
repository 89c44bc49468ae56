"""The units of single weights, N:M patterns and blocks: how many a weight has, their sums, and back to elements."""

from __future__ import annotations

import math

import torch
from torch import nn

from hfprune.granularity import Granularity
from hfprune.weights import Weight


def count_units(weight: Weight, shape: Granularity) -> int:
    """How many units a weight has; what is left over beside the last group of N:M is none."""
    if shape.kind == "n:m":
        width = weight.parameter.shape[weight.input_dim] if weight.parameter.ndim else 1
        return weight.parameter.numel() // width * (width // shape.group * shape.group)
    if shape.kind == "block":
        rows, cols = weight.as_matrix(weight.parameter.detach()).shape
        return math.ceil(rows / shape.rows) * math.ceil(cols / shape.cols)
    return weight.parameter.numel()


def block_sums(weight: Weight, tensor: torch.Tensor, shape: Granularity) -> torch.Tensor:
    """Sums over the blocks of a weight-shaped tensor, flat; one cut off by the edge counts as if it were whole."""
    matrix = weight.as_matrix(tensor)
    rows, cols = shape.rows, shape.cols
    padded = nn.functional.pad(matrix, (0, -matrix.shape[1] % cols, 0, -matrix.shape[0] % rows))
    high, wide = padded.shape[0] // rows, padded.shape[1] // cols
    sums = padded.view(high, rows, wide, cols).sum((1, 3))
    tall = torch.full((high, 1), float(rows), device=sums.device)
    broad = torch.full((1, wide), float(cols), device=sums.device)
    tall[-1], broad[0, -1] = matrix.shape[0] - (high - 1) * rows, matrix.shape[1] - (wide - 1) * cols
    return (sums * (rows * cols / (tall * broad)).to(sums.dtype)).reshape(-1)


def expand(weight: Weight, units: torch.Tensor, shape: Granularity) -> torch.Tensor:
    """From a value a unit to a value an element, in the weight's shape."""
    if shape.kind == "n:m":
        return units.movedim(-1, weight.input_dim).contiguous()
    if shape.kind == "weight":
        return units.view(weight.parameter.shape)
    height, width = weight.as_matrix(weight.parameter.detach()).shape
    blocks = units.view(-(-height // shape.rows), -1)
    matrix = blocks.repeat_interleave(shape.rows, 0).repeat_interleave(shape.cols, 1)
    return weight.from_matrix(matrix[:height, :width]).contiguous()
