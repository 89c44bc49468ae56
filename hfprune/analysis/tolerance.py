"""sensitivity(): what a model's metric is after each layer or group alone is pruned, at several ratios."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hfprune.analysis.chosen import LayerTolerance, Sensitivity
from hfprune.analysis.subject import CriterionSpec, Progress, Subject, labels_of
from hfprune.config import shrinks
from hfprune.criteria.calibration import LossFunction, batches_of, default_loss, to_device
from hfprune.errors import ConfigError, DataError, ModelError
from hfprune.structure.candidates import candidates
from hfprune.structure.graph import evaluating
from hfprune.structure.pruner import StructuredPruner
from hfprune.structure.removal import remove
from hfprune.structure.targets import Candidates, Solver

RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)
_ROUNDING = 1e-9
"""A drop that equals the tolerance is within it, however the division rounds."""

Evaluate = Callable[[nn.Module], float | Mapping[str, float]]
"""From the model, pruned, to its metric or several by name."""


def sensitivity(
    model: nn.Module,
    evaluate: Evaluate | None = None,
    *,
    metric: str = "loss",
    greater_is_better: bool | None = None,
    ratios: Sequence[float] = RATIOS,
    tolerance: float = 0.02,
    criterion: CriterionSpec = "l1",
    granularity: str | Sequence[str] | None = None,
    data: Any = None,
    loss: LossFunction | None = None,
    example_inputs: Any = None,
    include: Iterable[str] | None = None,
    ignore: Iterable[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> Sensitivity:
    """Measures a model after each layer or group alone is pruned, at several ratios and without training (as in Li et
    al. 2017, arXiv 1608.08710, section 3.1). The model ends exactly as it was, also when an evaluation fails.

    Example:
        >>> found = hfprune.sensitivity(model, accuracy_of, metric="accuracy")
        >>> print(found.to_yaml())          # a recipe's pruning section with its per_layer ratios

    Args:
        model: any module.
        evaluate: from the model to its metric, or to several by name.
        metric: the metric's name; `greater_is_better` is by default judged by it: loss, error, perplexity shrink.
        ratios: the fractions of a layer that are tried, each between 0 and 1.
        tolerance: the drop of the metric that is tolerated, as a fraction of the dense model's.
        criterion: what chooses the units: a name, or a map of `name` and parameters.
        granularity: as in `similarity`.
        data, loss, example_inputs: as in `prune`; by default the metric is the mean loss over the data.
        include, ignore, seed: as in `PruningConfig`.
        progress: told of every evaluation.

    Raises:
        ConfigError: a ratio or tolerance out of bounds, an unknown criterion, nothing to evaluate or prune.
        ModelError: a dense model whose metric is not a finite number.
    """
    ratios = _checked(ratios, tolerance)
    limits = {"include": None if include is None else list(include), "ignore": list(ignore)}
    given = {"data": data, "loss": loss, "example_inputs": example_inputs, "seed": seed, **limits}
    measure = _Measure(model, evaluate or _mean_loss(data, loss), metric, greater_is_better, tolerance, progress)
    subject = Subject(model, granularity, labels_of([criterion]), **given)
    layers = measure.layers(_groups(subject) if subject.is_structural else _masks(subject), ratios)
    return Sensitivity(
        model=type(model).__name__,
        criterion=criterion if isinstance(criterion, str) else dict(criterion),
        granularity=tuple(subject.granularities),
        metric=metric,
        greater_is_better=measure.greater_is_better,
        dense=measure.dense,
        ratios=ratios,
        tolerance=tolerance,
        layers=layers,
        limits={key: value for key, value in limits.items() if value},
        note=subject.note,
    )


@dataclass
class _Trial:
    """One layer that can be pruned and put back.

    Attributes:
        pieces: how many there are of what goes one by one; a piece is `size` units.
        most: the most pieces that may go.
        pruned: a context in which so many pieces are gone; a ModelError where the model's code does not let them.
        groups: the groups that are cut.
    """

    name: str
    pieces: int
    most: int
    pruned: Callable[[int], AbstractContextManager[None]]
    size: int = 1
    groups: tuple[str, ...] = ()

    def count(self, ratio: float) -> int:
        """How many pieces go at a ratio."""
        return min(self.most, round(ratio * self.pieces))


class _Measure:
    """Evaluates a model, dense and with parts gone."""

    def __init__(
        self,
        model: nn.Module,
        evaluate: Evaluate,
        metric: str,
        greater_is_better: bool | None,
        tolerance: float,
        progress: Progress | None,
    ):
        self.model, self.evaluate, self.metric, self.tolerance = model, evaluate, metric, tolerance
        self.greater_is_better = not shrinks(metric) if greater_is_better is None else greater_is_better
        self.tell = progress or (lambda *_: None)
        self.dense = math.nan

    def layers(self, trials: list[_Trial], ratios: Sequence[float]) -> dict[str, LayerTolerance]:
        """What every layer can lose; `dense` is set."""
        total = 1 + len(trials) * len(ratios)
        self.tell("dense", 0, total)
        self.dense = self._value()
        if not math.isfinite(self.dense):
            raise ModelError(f"the dense model's {self.metric} is {self.dense}; nothing can be compared with it")
        layers: dict[str, LayerTolerance] = {}
        for number, trial in enumerate(trials):
            values: dict[int, float | None] = {0: self.dense}
            for step, ratio in enumerate(ratios):
                self.tell(trial.name, 1 + number * len(ratios) + step, total)
                if (count := trial.count(ratio)) not in values:
                    values[count] = self._with(trial, count)
            tried = tuple(values[trial.count(ratio)] for ratio in ratios)
            drops = [_drop(self.dense, value, self.greater_is_better) for value in tried]
            pruned = tuple(trial.count(ratio) * trial.size for ratio in ratios)
            chosen = _largest(ratios, drops, self.tolerance)
            layers[trial.name] = LayerTolerance(trial.pieces * trial.size, pruned, tried, chosen, trial.groups)
        return layers

    def _with(self, trial: _Trial, count: int) -> float | None:
        """The metric with so many pieces gone; None where they can't go, or where it is not a finite number."""
        with ExitStack() as stack:
            try:
                stack.enter_context(trial.pruned(count))
            except ModelError:
                return None
            value = self._value()
        return value if math.isfinite(value) else None

    def _value(self) -> float:
        found = self.evaluate(self.model)
        if not isinstance(found, Mapping):
            return float(found)
        if self.metric not in found:
            raise ConfigError(f"metric: '{self.metric}' is not among what was measured: {', '.join(found)}")
        return float(found[self.metric])


def _masks(subject: Subject) -> list[_Trial]:
    """Every weight, of which units are set to zero."""
    pruner = subject.pruner

    def trial(layer: Any) -> _Trial:
        parameter = pruner.weights[layer.name].parameter

        @contextmanager
        def pruned(count: int) -> Iterator[None]:
            before = parameter.detach().clone()
            try:
                pruner.masks_of({layer.name: subject.goes(layer, count)}).apply(subject.model)
                yield
            finally:
                with torch.no_grad():
                    parameter.copy_(before)

        return _Trial(layer.name, layer.units, layer.units, pruned)

    return [trial(layer) for layer in subject.scores(*subject.criteria)]


def _groups(subject: Subject) -> list[_Trial]:
    """Every coupled group, of which units are removed; groups that are cut by one fraction go together."""
    pruner = subject.pruner
    (pruner.criterion,) = subject.criteria.values()
    found = candidates(pruner, pruner.scores(data=subject.data, loss=subject.loss), "ratio")
    order = list(pruner.groups)
    return [_group(pruner, each) for each in sorted(found, key=lambda each: order.index(each.name))]


def _group(pruner: StructuredPruner, each: Candidates) -> _Trial:
    solver = Solver([each], "layer", round_to=1)

    @contextmanager
    def pruned(count: int) -> Iterator[None]:
        removal = remove(pruner.structure, solver.choose(0.0, {each.name: count}))
        try:
            yield
        finally:
            removal.journal.rollback()

    groups = tuple(each.parts) if each.parts is not None else (each.name,)
    units = sum(pruner.groups[name].units for name in groups)
    return _Trial(each.name, len(each.scores), each.most, pruned, units // len(each.scores), groups)


def _drop(dense: float, value: float | None, greater_is_better: bool) -> float:
    """How much worse a value is than the dense one, as a fraction of it; without a value, infinitely."""
    if value is None:
        return math.inf
    worse = dense - value if greater_is_better else value - dense
    return worse / abs(dense) if dense else (0.0 if worse <= 0 else math.inf)


def _largest(ratios: Sequence[float], drops: Sequence[float], tolerance: float) -> float:
    """The largest ratio up to which every drop stays within the tolerance; 0 where the first exceeds it."""
    chosen = 0.0
    for ratio, drop in zip(ratios, drops, strict=True):
        if drop > tolerance + _ROUNDING:
            break
        chosen = ratio
    return chosen


def _checked(ratios: Sequence[float], tolerance: float) -> tuple[float, ...]:
    if isinstance(ratios, float) or not list(ratios):
        raise ConfigError("ratios: give one or more, e.g. 0.1, 0.3, 0.5")
    for ratio in ratios:
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
            raise ConfigError(f"ratios: {ratio!r} must lie between 0 and 1, e.g. 0.5")
    if not 0 <= tolerance < math.inf:
        raise ConfigError(f"tolerance: {tolerance!r} must be 0 or more, e.g. 0.02 for 2 % of the dense metric")
    return tuple(sorted({float(ratio) for ratio in ratios}))


def _mean_loss(data: Any, loss: LossFunction | None) -> Evaluate:
    if data is None:
        raise ConfigError("evaluate: nothing to measure with; give a function of the model, or data for the loss")
    batches = list(batches_of(data))
    if not batches:
        raise DataError("data: holds no batch to measure the loss on")

    def evaluate(model: nn.Module) -> float:
        device = next(model.parameters()).device
        with evaluating(model), torch.no_grad():
            losses = [float((loss or default_loss)(model, to_device(batch, device))) for batch in batches]
        return sum(losses) / len(losses)

    return evaluate
