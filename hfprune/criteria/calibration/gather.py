"""From a criterion to the statistics that it asks for."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hfprune.criteria.calibration.batches import LossFunction, batches_of
from hfprune.criteria.calibration.flow import synaptic_flow
from hfprune.criteria.calibration.gradients import gradient, squared_gradient
from hfprune.criteria.calibration.inputs import activation_entropy, active_fraction, input_norm, mean_activation
from hfprune.criteria.calibration.moments import input_moment
from hfprune.criteria.calibration.running import Calibration, Progress
from hfprune.criteria.calibration.second import curvature
from hfprune.criteria.complaints import blaming
from hfprune.criteria.criterion import WITHOUT_DATA, Criterion
from hfprune.errors import ConfigError, ModelError
from hfprune.sharding import local
from hfprune.weights import Weight

_WORDS = {
    "gradient": "gradients",
    "movement": "gradients",
    "squared_gradient": "gradients of single samples",
    "curvature": "second derivatives",
}
"""What data is needed for; the other statistics are of activations."""


def gather(
    criterion: Criterion,
    model: nn.Module,
    weights: dict[str, Weight],
    data: Any = None,
    *,
    loss: LossFunction | None = None,
    history: dict[str, torch.Tensor] | None = None,
    example_inputs: tuple[tuple, dict[str, Any]] | None = None,
    progress: Progress | None = None,
    partial: bool = False,
) -> dict[str, tuple[torch.Tensor, ...]]:
    """The statistics that a criterion asks for, by weight name; the model is left as it was.

    Args:
        criterion: says what it needs.
        model: run in evaluation mode, so that neither dropout nor running statistics take part.
        weights: those to be scored.
        data: a batch or an iterable of batches (`batches_of`).
        loss: from the model and a batch to a scalar; by default the model's own (`default_loss`).
        history: sums of weight times gradient from training, where there are any.
        example_inputs: positional and keyword arguments of one forward pass, for synaptic flow.
        progress: wraps the batches to show how far they are (`rich.progress.track` fits).
        partial: leave out weights that took no part, instead of refusing them.

    Raises:
        ConfigError: the criterion needs data and there is none.
        ModelError: the model can't take a batch, the loss is not finite, or a weight took no part in any batch.
    """
    wanted = criterion.statistics
    if not wanted or not weights:
        return {name: () for name in weights}
    calibration = Calibration(model, weights, data, criterion.batches, loss, progress, criterion.seed, example_inputs)
    found: dict[str, dict[str, torch.Tensor]] = {}
    if "movement" in wanted and history:
        found["movement"] = history
    needed = [statistic for statistic in wanted if statistic not in found and statistic not in WITHOUT_DATA]
    if needed and data is None:
        words = _WORDS.get(needed[0], "activations")
        raise ConfigError(
            f"pruning.criterion: '{criterion.name}' scores by {words} and needs data; give data, or use 'l1'"
        )
    if len(needed) > 1 or "activation_entropy" in needed:  # several passes over the same batches
        calibration = replace(calibration, data=list(itertools.islice(batches_of(data), criterion.batches)))
    with blaming(criterion.name):
        for statistic in wanted:
            if statistic not in found:
                found[statistic] = _statistic(statistic, calibration, criterion, found)
    absent = next((name for name in weights for s in wanted if name not in found[s]), None)
    if absent is not None and not partial:
        raise ModelError(
            f"pruning.criterion: '{criterion.name}' can't score '{absent}': it took no part in any calibration batch, "
            f"or its input can't be seen; name it in `ignore`, or give batches that reach it"
        )
    known = [name for name in weights if all(name in found[s] for s in wanted)]
    return {name: tuple(found[s][name] for s in wanted) for name in known}


def _statistic(
    name: str, calibration: Calibration, criterion: Criterion, found: dict[str, dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    if name == "movement":
        slopes = found["gradient"] if "gradient" in found else gradient(calibration)
        found["gradient"] = slopes
        weights = calibration.weights
        return {key: local(weights[key].parameter).detach() * slope for key, slope in slopes.items()}
    if name == "curvature":
        return curvature(calibration, criterion.probes)
    if name == "activation_entropy":
        return activation_entropy(calibration, criterion.bins)
    plain = {
        "gradient": gradient,
        "squared_gradient": squared_gradient,
        "synaptic_flow": synaptic_flow,
        "input_norm": input_norm,
        "input_moment": input_moment,
        "mean_activation": mean_activation,
        "active_fraction": active_fraction,
    }
    return plain[name](calibration)
