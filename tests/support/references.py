"""Criteria in plain loops over double precision numbers, for tests to compare with."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

Values = dict[str, torch.Tensor]


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def double(model: nn.Module) -> nn.Module:
    """A copy in double precision, in evaluation mode."""
    return copy.deepcopy(model).double().eval()


def squared_gradients(model: nn.Module, batches: Iterable[Any]) -> Values:
    """E[g²], one sample after the other."""
    model = double(model)
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    seen = 0
    for inputs, labels in batches:
        for index in range(len(labels)):
            model.zero_grad()
            loss_of(model, (inputs[index : index + 1].double(), labels[index : index + 1])).backward()
            seen += 1
            for name, parameter in model.named_parameters():
                sums[name] += parameter.grad * parameter.grad
    return {name: total / seen for name, total in sums.items()}


def hessian(model: nn.Module, batches: Iterable[Any], names: list[str]) -> torch.Tensor:
    """The whole Hessian of the loss averaged over batches, over the named weights flat one behind the other."""
    model = double(model)
    values = [model.get_parameter(name).detach() for name in names]
    sizes = [value.numel() for value in values]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = {n: p.view(v.shape) for n, p, v in zip(names, flat.split(sizes), values, strict=True)}
        found = [torch.func.functional_call(_Loss(model), {f"model.{n}": p for n, p in parts.items()}, (b,))
                 for b in batches]  # fmt: skip
        return torch.stack(found).mean()

    return torch.autograd.functional.hessian(loss, torch.cat([value.flatten() for value in values]))


class _Loss(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> torch.Tensor:
        return loss_of(self.model, (batch[0].double(), batch[1]))


def synaptic_flow(model: nn.Module, shape: tuple[int, ...]) -> Values:
    """w · dR/dw on a copy whose weights are absolute and whose running means are zero."""
    model = double(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.abs())
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.zero_()
    model(torch.ones(shape, dtype=torch.float64)).sum().backward()
    return {name: p.detach() * p.grad for name, p in model.named_parameters()}


def inputs_of(model: nn.Module, path: str, batches: Iterable[Any]) -> list[torch.Tensor]:
    """What reaches one layer, batch by batch."""
    model, seen = double(model), []
    model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for inputs, _ in batches:
            model(inputs.double())
    return seen


def by_channel(layer: nn.Module, inputs: Iterable[torch.Tensor]) -> list[list[float]]:
    """All values of every input channel."""
    found: list[list[float]] = []
    for value in inputs:
        value = value.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)
        found = found or [[] for _ in value]
        for channel, row in zip(found, value.tolist(), strict=True):
            channel += row
    return found


def channel_scores(name: str, values: list[float], bins: int = 32) -> float:
    """apoz, mean_activation or entropy of one channel."""
    if name == "apoz":
        return sum(value > 0 for value in values) / len(values)
    if name == "mean_activation":
        return math.fsum(abs(value) for value in values) / len(values)
    low, high = min(values), max(values)
    if low == high:
        return 0.0
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / (high - low) * bins))] += 1
    return -math.fsum(c / len(values) * math.log(c / len(values)) for c in counts if c)


def wanda(layer: nn.Module, inputs: Iterable[torch.Tensor]) -> torch.Tensor:
    """|w| ||x||₂, by asking the layer's own forward pass for every weight alone which inputs it is multiplied with."""
    weight = layer.weight.detach()
    scores = torch.zeros(weight.shape, dtype=torch.float64)
    probe = copy.deepcopy(layer).double()
    if probe.bias is not None:
        nn.init.zeros_(probe.bias)
    for place in itertools.product(*(range(n) for n in weight.shape)):
        squares = 0.0
        with torch.no_grad():
            probe.weight.zero_()
            probe.weight[place] = 1.0  # then the results are the inputs that meet it
            for value in inputs:
                squares += math.fsum(x * x for x in probe(value).flatten().tolist())
        scores[place] = abs(float(weight[place])) * math.sqrt(squares)
    return scores


def distances(rows: list[list[float]]) -> list[float]:
    """fpgm: the sum of the distances to all other rows."""
    return [math.fsum(math.dist(row, other) for other in rows) for row in rows]


def median_distances(rows: list[list[float]]) -> list[float]:
    """fermat: the distance to the geometric median, by Weiszfeld's iteration until it stands still."""
    size = len(rows[0])
    median = [math.fsum(row[i] for row in rows) / len(rows) for i in range(size)]
    for _ in range(2000):
        weights = [1 / max(math.dist(row, median), 1e-300) for row in rows]
        total = math.fsum(weights)
        median = [math.fsum(w * row[i] for w, row in zip(weights, rows, strict=True)) / total for i in range(size)]
    return [math.dist(row, median) for row in rows]


def unit_rows(tensor: torch.Tensor, dim: int, indices: torch.Tensor) -> list[list[float]]:
    """The elements of every unit, picked one by one."""
    rows = []
    for unit in indices.tolist():
        row = []
        for place in itertools.product(*(range(n) for n in tensor.shape)):
            if place[dim] in unit:
                row.append(float(tensor[place]))
        rows.append(row)
    return rows


def of_group(parts: list[list[float]]) -> list[float]:
    """The mean over a group's members, divided by its own mean size."""
    means = [math.fsum(column) / len(parts) for column in zip(*parts, strict=True)]
    size = math.fsum(abs(mean) for mean in means) / len(means)
    return [mean / size for mean in means]
