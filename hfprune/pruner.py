"""Pruner: score and select for one model and configuration; it decides, and leaves applying to its caller."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hfprune.bits import PackedTensors
from hfprune.config import PruningConfig
from hfprune.counts import Counts
from hfprune.criteria import check_granularity, create
from hfprune.criteria.calibration import LossFunction, Progress, example_inputs_of, gather
from hfprune.criteria.complaints import warn_of_equal
from hfprune.criteria.criterion import WITHOUT_DATA
from hfprune.criteria.visit import visit
from hfprune.errors import ConfigError, ModelError, and_more
from hfprune.granularity import parse_granularity
from hfprune.masks import MaskSet
from hfprune.originals import Originals
from hfprune.profiling import example_batch
from hfprune.selection import LayerScores, pattern_candidates, select, select_each, select_rows
from hfprune.sharding import ALONE, Across
from hfprune.units import block_sums, count_units, expand
from hfprune.weights import Weight, check_pattern, prunable_weights, scorable


class Pruner:
    """What a configuration means for a model: its prunable weights, their units, and which of them go at a target.

    Args:
        model: any module; it is never changed here.
        config: what to prune.
        seed: of random scores where the configuration names none.

    Raises:
        ConfigError: a pattern that matches nothing, an unknown criterion, a target that can't be reached.
    """

    def __init__(self, model: nn.Module, config: PruningConfig, seed: int = 0):
        self.model = model
        self.config = config
        self.shape = parse_granularity(config.granularity)
        self.pattern = "unstructured" if self.shape.kind == "weight" else config.granularity
        seed = config.seed if config.seed is not None else seed
        self.criterion = create(config.criterion_name, config.criterion_parameters, seed)
        check_granularity(self.criterion, config.criterion_name, config.granularities)
        self.weights = prunable_weights(model, config.include, config.ignore)
        for pattern in config.per_layer:
            check_pattern(model, pattern, "pruning.per_layer", self.weights)
        self.units = {name: count_units(weight, self.shape) for name, weight in self.weights.items()}
        self.counts = Counts(config, self.weights, self.units, self.shape, by_row=self.by_row and not self.visits)

    @property
    def needs_data(self) -> bool:
        """Whether the criterion runs batches through the model."""
        return self.criterion.needs_data or self.visits

    @property
    def visits(self) -> bool:
        """Whether layers are pruned one after another, each on what the pruned ones before it give."""
        return self.criterion.layerwise and self.shape.kind in ("weight", "n:m")

    @property
    def by_row(self) -> bool:
        """Whether weights are compared within their output row, of which every one loses the same number."""
        return self.criterion.by_row and self.shape.kind == "weight"

    @property
    def total_units(self) -> int:
        """How many units there are."""
        return sum(self.units.values())

    @contextmanager
    def only(self, names: Iterable[str]) -> Iterator[None]:
        """Prunes some of the weights alone for a while, as if there were no others."""
        whole = self.weights
        self.weights = self.counts.weights = {name: whole[name] for name in names}
        try:
            yield
        finally:
            self.weights = self.counts.weights = whole

    def wanted(self, target: float) -> int:
        """How many units are gone in all at a cumulative target, by scope, layers' own ratios and exact rounding."""
        return self.counts.wanted(target)

    def select(
        self,
        target: float,
        masks: MaskSet | None = None,
        *,
        data: Any = None,
        loss: LossFunction | None = None,
        history: dict[str, torch.Tensor] | None = None,
        example_inputs: Any = None,
        progress: Progress | None = None,
    ) -> MaskSet:
        """The masks at a cumulative target; what `masks` hold at zero stays so. The model is not changed.

        Args:
            target: the fraction of all units that is gone afterwards.
            masks: those of the step before.
            data, loss, history, progress: for criteria that need them (`criteria.calibration.gather`).
            example_inputs: for criteria that need no data but a forward pass; may be left out for transformers and timm
                models, and where there is data.

        Raises:
            ConfigError: the criterion lacks data.
            ModelError: scores that are not numbers, a batch that the model can't take.
        """
        if self.visits:
            with Originals() as originals:
                try:
                    return self.visit(target, masks, originals, data=data, loss=loss)
                finally:
                    originals.restore()
        given = {"data": data, "loss": loss, "history": history, "progress": progress}
        statistics = self._statistics(example_inputs, given)
        masks = masks or MaskSet({})
        if self.shape.kind == "n:m":
            gone = self._select_pattern(target, masks, statistics)
        elif self.by_row:
            gone = self._select_rows(target, masks, statistics)
        else:
            layers = [self._layer_scores(weight, masks, statistics[name]) for name, weight in self.weights.items()]
            gone = self._select_units(target, layers)
            self._warn_of_whole(layers, gone)
        found, kept = self.masks_of(gone), PackedTensors()
        for name in [*self.weights, *masks]:
            if name in masks and name in found:
                kept[name] = found.kept[name] & masks.kept[name]
            elif name in masks or name in found:
                kept.take((found if name in found else masks).kept, name)
        return MaskSet(kept, self.pattern)

    def visit(
        self,
        target: float,
        masks: MaskSet | None,
        originals: Originals,
        *,
        data: Any = None,
        loss: LossFunction | None = None,
    ) -> MaskSet:
        """`select` for a criterion that prunes layer after layer: the model is pruned when it returns.

        Args:
            target, masks, data, loss: as in `select`.
            originals: takes the values that change, which the caller puts back when anything fails.
        """
        masks = masks or MaskSet({})
        goals = self.counts.goals(target, masks)
        name = self.config.criterion_name
        found = visit(self.criterion, name, self.model, self.weights, goals, masks, data, originals, loss)
        kept = PackedTensors()
        for name in [*self.weights, *masks]:
            kept.take(found if name in found else masks.kept, name)
        return MaskSet(kept, self.pattern)

    def masks_of(self, gone: dict[str, torch.Tensor]) -> MaskSet:
        """The masks that hold these units at zero; the tensors are used up.

        Args:
            gone: weight name to a bool tensor, true for a unit that goes: of N:M in the weight's shape with the input
                dimension last, else flat.
        """
        kept = PackedTensors()
        for name in list(gone):
            kept[name] = expand(self.weights[name], gone.pop(name).logical_not_(), self.shape)
        return MaskSet(kept, self.pattern)

    def layer_scores(
        self, *, data: Any = None, loss: LossFunction | None = None, example_inputs: Any = None
    ) -> list[LayerScores]:
        """The scores of every layer's units, the model taken as it is; nothing is selected.

        Args:
            data, loss, example_inputs: as in `select`.
        """
        if self.visits and not self.criterion.statistics:
            name = self.criterion.name
            raise ConfigError(f"pruning.criterion: '{name}' has no scores but while it prunes; it can't be compared")
        statistics = self._statistics(example_inputs, {"data": data, "loss": loss})
        nothing = MaskSet({})
        return [self._layer_scores(weight, nothing, statistics[name]) for name, weight in self.weights.items()]

    def gone(self, masks: MaskSet) -> int:
        """How many units the masks hold at zero; of blocks only whole ones count."""
        count = 0
        for name, weight in self.weights.items():
            gone = masks.gone(name)
            if gone is not None and self.shape.kind == "block":
                count += int((block_sums(weight, (~gone).float(), self.shape) == 0).sum())
            elif gone is not None:
                count += min(int(gone.sum()), self.units[name])
        return count

    def _statistics(self, example_inputs: Any, given: dict[str, Any]) -> dict[str, tuple[torch.Tensor, ...]]:
        example = None
        if set(self.criterion.statistics) & set(WITHOUT_DATA):
            if hasattr(given["data"], "__next__"):  # looking at the first batch must not lose it
                given = given | {"data": list(itertools.islice(given["data"], self.criterion.batches))}
            example_inputs = example_inputs_of(given["data"]) if example_inputs is None else example_inputs
            example = example_batch(self.model, example_inputs)
        return gather(self.criterion, self.model, self.weights, **given, example_inputs=example)

    def _select_units(self, target: float, layers: list[LayerScores]) -> dict[str, torch.Tensor]:
        own = [layer for layer in layers if layer.name in self.counts.own_ratio]
        rest = [layer for layer in layers if layer.name not in self.counts.own_ratio]
        gone = select_each(own, {layer.name: self.counts.own(layer.name, target) for layer in own})
        if self.config.scope == "layer":
            gone |= select_each(rest, {layer.name: self.counts.layer(layer.name, target) for layer in rest})
        elif rest:
            wanted = round(target * sum(self.units[layer.name] for layer in rest))
            gone |= select(rest, max(wanted, sum(layer.already for layer in rest)))
        return gone

    def _select_rows(
        self, target: float, masks: MaskSet, statistics: dict[str, tuple[torch.Tensor, ...]]
    ) -> dict[str, torch.Tensor]:
        """The same number of weights of every output row, in every layer by the same ratio."""
        gone = {}
        goals = self.counts.goals(target, masks)
        for name, weight in self.weights.items():
            scores = weight.as_matrix(self._terms(weight, weight.parameter.detach(), statistics[name], finish=True))
            before = masks.gone(name)
            chosen = select_rows(scores, goals[name].count, None if before is None else weight.as_matrix(before))
            gone[name] = weight.from_matrix(chosen).contiguous()
        return gone

    def _warn_of_whole(self, layers: list[LayerScores], gone: dict[str, torch.Tensor]) -> None:
        """Says where a layer goes as a whole, and where its scores tell nothing apart."""
        name = self.config.criterion_name
        newly = {layer.name: int(gone[layer.name].sum()) for layer in layers}
        open_layers = [layer for layer in layers if newly[layer.name] > layer.already]
        emptied = [layer.name for layer in open_layers if newly[layer.name] == layer.units]
        self._warn_of_emptied(emptied)
        if alike := [layer.name for layer in open_layers if layer.name not in emptied and layer.all_equal()]:
            warn_of_equal(name, alike)

    def _warn_of_emptied(self, emptied: list[str]) -> None:
        if emptied:
            which, name = f"'{emptied[0]}'{and_more(emptied)}", self.config.criterion_name
            hint = "min_kept keeps a part of every layer"
            warnings.warn(f"pruning.criterion: '{name}' removes all of {which}; {hint}", stacklevel=6)

    def _select_pattern(
        self, target: float, masks: MaskSet, statistics: dict[str, tuple[torch.Tensor, ...]]
    ) -> dict[str, torch.Tensor]:
        """N:M: the whole pattern at the final target; before it, an exact part of it, the lowest scores first."""
        gone = {}
        for name, weight in self.weights.items():
            scores = self._terms(weight, weight.parameter.detach(), statistics[name], finish=True)
            gone[name] = self._pattern(weight, scores, masks.gone(name), target)
        return gone

    def _pattern(
        self,
        weight: Weight,
        scores: torch.Tensor,
        before: torch.Tensor | None,
        target: float,
        across: Across = ALONE,
    ) -> torch.Tensor:
        """What N:M removes of a weight, with the input dimension last.

        Args:
            weight: which one.
            scores: of its elements, or of the rows that lie here.
            before: what is gone already, in the same shape.
            target: the cumulative target.
            across: the processes that hold the other rows.
        """
        name, scores = weight.name, weight.input_last(scores)
        before = None if before is None else weight.input_last(before)
        candidates = pattern_candidates(scores, self.shape.kept, self.shape.group, before)
        if target >= self.config.ratio:
            return candidates
        flat = scores.reshape(-1)
        layer = LayerScores(
            name,
            flat.numel(),
            lambda start, stop: flat[start:stop],
            gone=None if before is None else before.reshape(-1),
            candidates=candidates.reshape(-1),
            across=across,
        )
        return select_each([layer], {name: self.counts.layer(name, target)})[name].view(scores.shape)

    def _terms(
        self, weight: Weight, value: torch.Tensor, statistics: tuple[torch.Tensor, ...], finish: bool = False
    ) -> torch.Tensor:
        """The terms of a whole layer, or of the rows that lie here, in the shape of their value."""
        terms = self.criterion.terms(weight.name, scorable(value), *statistics)
        if not torch.isfinite(terms).all():
            raise ModelError(
                f"pruning.criterion: '{self.config.criterion_name}' gave scores that are not finite in '{weight.name}'"
            )
        return self.criterion.finish(terms) if finish else terms

    def _check_finite(self, scores: torch.Tensor, name: str) -> None:
        if torch.isfinite(scores.sum()) or torch.isfinite(scores).all():
            return
        what = "a score that is not a number in" if bool(scores.isnan().any()) else "an infinite score in"
        raise ModelError(f"pruning.criterion: '{self.config.criterion_name}' gave {what} '{name}'")

    def _layer_scores(self, weight: Weight, masks: MaskSet, statistics: tuple[torch.Tensor, ...]) -> LayerScores:
        name, value = weight.name, weight.parameter.detach()
        gone = masks.gone(name)
        if self.shape.kind == "block":
            scores = self._block_scores(weight, value, statistics)
            if gone is not None:
                gone = block_sums(weight, (~gone).float(), self.shape) == 0
        elif not self.criterion.pointwise or not value.is_contiguous():
            scores = self._terms(weight, value, statistics, finish=True).reshape(-1)
        else:
            return self._pointwise_scores(name, value, statistics, gone)
        gone = None if gone is None else gone.reshape(-1)
        return LayerScores(name, self.units[name], lambda a, b: scores[a:b], gone=gone, limit=self.counts.limit(name))

    def _block_scores(self, weight: Weight, value: torch.Tensor, statistics: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self.criterion.finish(block_sums(weight, self._terms(weight, value, statistics), self.shape))

    def _pointwise_scores(
        self,
        name: str,
        value: torch.Tensor,
        statistics: tuple[torch.Tensor, ...],
        gone: torch.Tensor | None,
        across: Across = ALONE,
    ) -> LayerScores:
        """The scores of single weights, made a slice at a time: of a whole layer, or of the rows that lie here."""
        flat = value.reshape(-1)
        parts = tuple(statistic.reshape(-1) for statistic in statistics)
        checked: set[int] = set()

        def scores_of(start: int, stop: int) -> torch.Tensor:
            part = scorable(flat[start:stop])
            terms = self.criterion.terms(name, part, *(s[start:stop] for s in parts))
            scores = self.criterion.finish(terms)
            if start not in checked:  # selection looks at every part several times
                self._check_finite(scores, name)
                checked.add(start)
            return scores

        gone = None if gone is None else gone.reshape(-1)
        return LayerScores(name, flat.numel(), scores_of, gone=gone, limit=self.counts.limit(name), across=across)
