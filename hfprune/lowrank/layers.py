"""The layers of a model that may be factored, and what the choice of ranks needs to know of each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from hfprune.config import PruningConfig
from hfprune.lowrank.factor import can_factor, largest_rank, matrix_shape
from hfprune.lowrank.measures import multiplications
from hfprune.lowrank.ranks import Candidate
from hfprune.weights import Weight, pattern_for, prunable_weights


@dataclass(frozen=True)
class Layer:
    """A layer that may be factored, as it is now.

    Attributes:
        path: the module's.
        weight, module: both dense.
        macs: its multiply-accumulates for one example.
    """

    path: str
    weight: Weight
    module: nn.Module
    macs: float


def layers_of(model: nn.Module, config: PruningConfig, example_inputs: Any) -> list[Layer]:
    """The layers that may be factored, in the model's order.

    Args:
        model: holds no factored layers.
        config: says which layers are left alone.
        example_inputs: as for `measure`.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found: dict[str, Weight] = {}
    for name, weight in prunable_weights(model, config.include, config.ignore).items():
        path, _, leaf = name.rpartition(".")
        # A weight that several layers share would have to be factored in all of them alike.
        if not path or leaf != "weight" or owners[id(weight.parameter)] > 1:
            continue
        module = model.get_submodule(path)
        if can_factor(module) and largest_rank(module):
            found[path] = weight
    modules = {path: model.get_submodule(path) for path in found}
    macs = multiplications(model, modules, example_inputs)
    return [Layer(path, weight, modules[path], macs[path]) for path, weight in found.items() if path in macs]


def candidate(
    layer: Layer, scores: np.ndarray, config: PruningConfig, full: int, rank: int | None, share: float
) -> Candidate | None:
    """What the choice needs to know of a layer; None where it stays dense.

    Args:
        layer: dense, even where it was factored before.
        scores: of its components, falling.
        config: says what is measured, in which steps ranks go, and how few components stay.
        full: how many components it had in the dense model.
        rank: the rank of the step before; None where it was dense.
        share: of the layer's own ratio, where it has one, that is due at this step.
    """
    rows, columns = matrix_shape(layer.module)
    unit, whole = {
        "ratio": (1.0, float(min(rows, columns))),
        "params": (float(rows + columns), float(rows * columns)),
        "macs": (layer.macs / (rows * columns) * (rows + columns), layer.macs),
    }[config.target.kind]
    most = largest_rank(layer.module)
    dense = rank is None or rank > most
    most = min(most, rank or most)
    step = config.round_to if most >= 2 * config.round_to else 1
    most = most // step * step
    least = config.min_kept if isinstance(config.min_kept, int) else math.ceil(config.min_kept * full)
    least = -(-max(1, least) // step) * step
    if not unit or (least > most and dense):
        return None
    least, fixed = min(least, most), False
    if (pattern := pattern_for(layer.weight.name, config.per_layer)) is not None:
        kept = round((1 - config.per_layer[pattern] * share) * full) // step * step
        fixed, dense, most = True, dense and kept > most, max(least, min(most, kept))
    if config.normalize != "none" and config.target.kind != "ratio":
        scores = scores * (rows + columns)  # a layer's share of the error counts by its size
    return Candidate(layer.path, scores, unit, whole, least, most, step, dense, full, f"{rows} {columns}", fixed)
