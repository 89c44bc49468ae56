"""similarity(): how alike criteria rank a model's units, and whether each of them tells units apart."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from hfprune.analysis.figures import (
    Agreement,
    Dispersion,
    Moments,
    Normality,
    correlations,
    edges,
    gap_between,
    gaussian_gap,
    normality,
    overlaps,
)
from hfprune.analysis.report import Similarity
from hfprune.analysis.subject import CriterionSpec, Progress, Subject, labels_of, sampled, values_at
from hfprune.criteria.calibration import LossFunction
from hfprune.errors import ConfigError
from hfprune.selection import LayerScores

SAMPLE = 10_000
"""Rank correlations of more units than this are those of a sample: its error is about 0.01."""

WEIGHTS_TESTED = 5_000


def similarity(
    model: nn.Module,
    criteria: str | Iterable[CriterionSpec],
    ratio: float = 0.5,
    *,
    granularity: str | Sequence[str] | None = None,
    data: Any = None,
    loss: LossFunction | None = None,
    example_inputs: Any = None,
    include: Iterable[str] | None = None,
    ignore: Iterable[str] = (),
    reduction: str = "mean",
    normalize: str = "mean",
    seed: int = 0,
    sample: int = SAMPLE,
    progress: Progress | None = None,
) -> Similarity:
    """Compares criteria on a model, which is left as it was (Huang et al. 2021, arXiv 2004.11627; the flags are ours).

    What would be pruned is counted exactly, without `round_to` and `min_kept`; groups that code cuts only by one
    fraction count one by one.

    Example:
        >>> found = hfprune.similarity(model, ["l1", "l2", "taylor"], ratio=0.5, data=loader)
        >>> rich.print(found.table())

    Args:
        model: any module.
        criteria: names, or maps of `name` and parameters.
        ratio: the fraction of the units that would go, between 0 and 1.
        granularity: `channel` (any coupled group), `head`, `neuron`, `width` or a list of them; `weight` or
            `block:RxC`. By default `channel` where the model's structure can be analysed, else `weight`.
        data: for criteria that need it: a batch or an iterable of batches.
        loss: from the model and a batch to a scalar; by default as in `prune`.
        example_inputs: for structural granularities; may be left out for transformers and timm models.
        include, ignore, reduction, normalize: as in `PruningConfig`.
        seed: of random scores and of samples.
        sample: the most units whose ranks are compared, in each layer and over all; overlaps are exact.
        progress: told of every step.

    Raises:
        ConfigError: an unknown criterion, a ratio out of bounds, missing data, a model without layers to prune.
        ModelError: a batch that the model can't take, a score that is not a number.
    """
    _check(ratio, sample)
    labels = labels_of(criteria)
    tell = progress or (lambda *_: None)
    tell("structure", 0, len(labels) + 1)
    limits = {"include": include, "ignore": ignore, "reduction": reduction, "normalize": normalize, "seed": seed}
    subject = Subject(model, granularity, labels, data=data, loss=loss, example_inputs=example_inputs, **limits)
    seen: dict[str, _Seen] = {}
    # Criteria that need data come first, so that missing data is said before the long work.
    for step, label in enumerate(sorted(labels, key=lambda label: not subject.criteria[label].needs_data)):
        tell(label, step + 1, len(labels) + 1)
        seen[label] = _look(subject, label, ratio, sample)
    return _found(subject, {label: seen[label] for label in labels}, float(ratio), sample)


def _check(ratio: float, sample: int) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise ConfigError(f"ratio: {ratio!r} must lie between 0 and 1, e.g. 0.5")
    if sample < 2:
        raise ConfigError(f"sample: {sample} units can't be ranked; give at least 2")


def _found(subject: Subject, seen: dict[str, _Seen], ratio: float, sample: int) -> Similarity:
    """The report on all criteria."""
    pairs = list(itertools.combinations(seen, 2))
    return Similarity(
        model=type(subject.model).__name__,
        criteria=tuple(seen),
        ratio=ratio,
        granularity=tuple(subject.granularities),
        normalize=subject.pruner.config.normalize if subject.is_structural else "none",
        layers={name: len(gone) for name, gone in next(iter(seen.values())).alone.items()},
        sample=sample,
        seed=subject.seed,
        within={pair: _within(seen[pair[0]], seen[pair[1]]) for pair in pairs},
        together={pair: _together(seen[pair[0]], seen[pair[1]]) for pair in pairs},
        dispersion={label: entry.dispersion for label, entry in seen.items()},
        dispersion_together={label: entry.dispersion_together for label, entry in seen.items()},
        emptied={label: tuple(entry.emptied) for label, entry in seen.items()},
        costs={label: _cost(subject, label) for label in seen},
        single_weights=subject.has_single_weights,
        normality=_normality(subject),
        note=subject.note,
    )


@dataclass
class _Seen:
    """What one criterion gave.

    Attributes:
        ranked: layer to the scores whose ranks are compared.
        pooled: the same over all layers.
        alone: layer to what goes when every layer is pruned by the ratio.
        ranked_together: layer to what goes when all are ranked together.
    """

    ranked: dict[str, np.ndarray] = field(default_factory=dict)
    pooled: np.ndarray = field(default_factory=lambda: np.zeros(0))
    alone: dict[str, torch.Tensor] = field(default_factory=dict)
    ranked_together: dict[str, torch.Tensor] = field(default_factory=dict)
    dispersion: dict[str, Dispersion] = field(default_factory=dict)
    dispersion_together: Dispersion | None = None
    emptied: list[str] = field(default_factory=list)


def _look(subject: Subject, label: str, ratio: float, sample: int) -> _Seen:
    layers = subject.scores(label)
    seen = _Seen()
    seen.alone = {layer.name: subject.goes(layer, round(ratio * layer.units)).cpu() for layer in layers}
    seen.ranked_together = {name: gone.cpu() for name, gone in subject.go_together(layers, ratio).items()}
    seen.emptied = [name for name, gone in seen.ranked_together.items() if bool(gone.all())]
    total = sum(layer.units for layer in layers)
    pooled, offset = sampled(total, sample, subject.seed), 0
    parts = []
    for layer in layers:
        seen.ranked[layer.name] = values_at(layer, sampled(layer.units, sample, subject.seed)).numpy()
        inside = None
        if pooled is not None:
            low, high = torch.searchsorted(pooled, torch.tensor([offset, offset + layer.units])).tolist()
            inside = pooled[low:high] - offset
        parts.append(values_at(layer, inside))
        offset += layer.units
    seen.pooled = torch.cat(parts).numpy()
    _disperse(seen, layers, subject.gaussian_scores(label))
    return seen


def _disperse(seen: _Seen, layers: list[LayerScores], drawn: list[list[LayerScores]]) -> None:
    """Fills in the dispersion of every layer and of all together, beside that of Gaussian weights."""
    floors, floor_together = _floors(drawn)
    whole, highest, lowest = Moments(), -np.inf, np.inf
    for layer in layers:
        moments, gone = _moments(layer), seen.alone[layer.name]
        whole.merge(moments)
        gap = gap_between(*edges(layer, gone), moments.scale)
        pruned, floor = int(gone.sum()), floors.get(layer.name)
        gap_floor = gaussian_gap(floor, layer.units, pruned)
        seen.dispersion[layer.name] = Dispersion(moments.cv, floor, gap, gap_floor, layer.units, pruned)
        above, below = edges(layer, seen.ranked_together[layer.name])
        highest, lowest = max(highest, above), min(lowest, below)
    pruned = sum(int(gone.sum()) for gone in seen.ranked_together.values())
    gap = gap_between(highest, lowest, whole.scale)
    gap_floor = gaussian_gap(floor_together, whole.units, pruned)
    seen.dispersion_together = Dispersion(whole.cv, floor_together, gap, gap_floor, whole.units, pruned)


def _floors(drawn: list[list[LayerScores]]) -> tuple[dict[str, float], float | None]:
    """The dispersion of Gaussian weights, by layer and over all: the root mean square over the draws."""
    found: dict[str, list[float]] = {}
    for layers in drawn:
        whole = Moments()
        for layer in layers:
            moments = _moments(layer)
            whole.merge(moments)
            if moments.cv is not None:
                found.setdefault(layer.name, []).append(moments.cv)
        if whole.cv is not None:
            found.setdefault("", []).append(whole.cv)
    means = {name: float(np.sqrt(np.mean(np.square(values)))) for name, values in found.items()}
    together = means.pop("", None)
    return means, together


def _moments(layer: LayerScores) -> Moments:
    moments = Moments()
    for _, _, _, scores in layer.chunks(torch.float64):
        moments.add(scores)
    return moments


def _within(one: _Seen, other: _Seen) -> dict[str, Agreement]:
    return {
        name: Agreement(
            *correlations(one.ranked[name], other.ranked[name]),
            *overlaps([one.alone[name]], [other.alone[name]]),
            len(one.alone[name]),
        )
        for name in one.ranked
    }


def _together(one: _Seen, other: _Seen) -> Agreement:
    chosen = [list(seen.ranked_together.values()) for seen in (one, other)]
    units = sum(len(gone) for gone in chosen[0])
    return Agreement(*correlations(one.pooled, other.pooled), *overlaps(*chosen), units)


def _cost(subject: Subject, label: str) -> int:
    """By what the cheaper of two criteria is told: 0 needs single weights, 1 whole layers or the model, 2 data."""
    criterion = subject.criteria[label]
    if criterion.needs_data:
        return 2
    return 0 if criterion.pointwise and not criterion.statistics and not criterion.of_units else 1


def _normality(subject: Subject) -> dict[str, Normality | None]:
    found = {}
    for name, weight in subject.weights().items():
        places = sampled(weight.numel(), WEIGHTS_TESTED, subject.seed)
        values = weight.flatten() if places is None else weight.flatten()[places.to(weight.device)]
        tested = normality(values)
        found[name] = None if tested is None else dataclasses.replace(tested, values=weight.numel())
    return found
