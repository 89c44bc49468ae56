"""Pruner: score and select for one model and configuration; it decides, and leaves applying to its caller."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import nn

from hfprune.config import PruningConfig
from hfprune.criteria import check_granularity, create
from hfprune.criteria.calibration import LossFunction, Progress, example_inputs_of, gather
from hfprune.criteria.criterion import WITHOUT_DATA
from hfprune.errors import ConfigError, ModelError
from hfprune.granularity import parse_granularity
from hfprune.masks import MaskSet
from hfprune.profiling import example_batch
from hfprune.selection import LayerScores, pattern_candidates, select, select_each, select_rows
from hfprune.weights import Weight, check_pattern, pattern_for, prunable_weights


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
        self.own_ratio = {
            name: config.per_layer[pattern]
            for name in self.weights
            if (pattern := pattern_for(name, config.per_layer)) is not None
        }
        self.units = {name: self._count_units(weight) for name, weight in self.weights.items()}
        self._check_reachable()

    @property
    def needs_data(self) -> bool:
        """Whether the criterion runs batches through the model."""
        return self.criterion.needs_data

    @property
    def by_row(self) -> bool:
        """Whether weights are compared within their output row, of which every one loses the same number."""
        return self.criterion.by_row and self.shape.kind == "weight"

    @property
    def total_units(self) -> int:
        """How many units there are."""
        return sum(self.units.values())

    def wanted(self, target: float) -> int:
        """How many units are gone in all at a cumulative target, by scope, layers' own ratios and exact rounding."""
        rest = [name for name in self.weights if name not in self.own_ratio]
        own = sum(self._own_count(name, target) for name in self.own_ratio)
        if self.config.scope == "layer" or self.shape.kind == "n:m":
            return own + sum(self._layer_count(name, target) for name in rest)
        return own + round(target * sum(self.units[name] for name in rest))

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
            self._warn_of_equal(layers, gone)
        kept = {name: mask for name, mask in masks.kept.items() if name not in gone}
        for name, mask in self.masks_of(gone).kept.items():
            before = masks.gone(name)
            kept[name] = mask if before is None else mask & ~before
        return MaskSet({name: kept[name] for name in self.weights if name in kept} | kept, self.pattern)

    def masks_of(self, gone: dict[str, torch.Tensor]) -> MaskSet:
        """The masks that hold these units at zero; the tensors are used up.

        Args:
            gone: weight name to a bool tensor, true for a unit that goes: of N:M in the weight's shape with the input
                dimension last, else flat.
        """
        kept = {name: self._expand(self.weights[name], gone.pop(name).logical_not_()) for name in list(gone)}
        return MaskSet(kept, self.pattern)

    def layer_scores(
        self, *, data: Any = None, loss: LossFunction | None = None, example_inputs: Any = None
    ) -> list[LayerScores]:
        """The scores of every layer's units, the model taken as it is; nothing is selected.

        Args:
            data, loss, example_inputs: as in `select`.
        """
        statistics = self._statistics(example_inputs, {"data": data, "loss": loss})
        nothing = MaskSet({})
        return [self._layer_scores(weight, nothing, statistics[name]) for name, weight in self.weights.items()]

    def gone(self, masks: MaskSet) -> int:
        """How many units the masks hold at zero; of blocks only whole ones count."""
        count = 0
        for name, weight in self.weights.items():
            gone = masks.gone(name)
            if gone is not None and self.shape.kind == "block":
                count += int((self._block_sums(weight, (~gone).float()) == 0).sum())
            elif gone is not None:
                count += min(int(gone.sum()), self.units[name])
        return count

    def _statistics(self, example_inputs: Any, given: dict[str, Any]) -> dict[str, tuple[torch.Tensor, ...]]:
        example = None
        if set(self.criterion.statistics) & set(WITHOUT_DATA):
            example_inputs = example_inputs_of(given["data"]) if example_inputs is None else example_inputs
            example = example_batch(self.model, example_inputs)
        return gather(self.criterion, self.model, self.weights, **given, example_inputs=example)

    def _count_units(self, weight: Weight) -> int:
        if self.shape.kind == "n:m":
            width = weight.parameter.shape[weight.input_dim] if weight.parameter.ndim else 1
            return weight.parameter.numel() // width * (width // self.shape.group * self.shape.group)
        if self.shape.kind == "block":
            rows, cols = weight.as_matrix(weight.parameter.detach()).shape
            return math.ceil(rows / self.shape.rows) * math.ceil(cols / self.shape.cols)
        return weight.parameter.numel()

    def _check_reachable(self) -> None:
        if self.total_units == 0:
            raise ConfigError(
                f"pruning.granularity: no layer's input dimension holds a group of {self.shape.group}, so nothing of "
                f"'{self.config.granularity}' can be pruned"
            )
        for name, ratio in self.own_ratio.items():
            if round(ratio * self.units[name]) > self._limit(name):
                raise ConfigError(f"pruning.per_layer: {ratio} for '{name}' removes more than min_kept allows")
        rest = [name for name in self.weights if name not in self.own_ratio]
        limits = sum(self._limit(name) for name in rest)
        wanted = round(self.config.ratio * sum(self.units[name] for name in rest))
        if self.config.scope == "global" and wanted > limits:
            reachable = math.floor(limits / sum(self.units[name] for name in rest) * 1e4) / 1e4
            raise ConfigError(
                f"pruning.target.ratio: {self.config.ratio} can't be reached with min_kept {self.config.min_kept}; "
                f"at most {reachable}"
            )
        if self.config.scope == "layer" or self.by_row:
            for name in rest:
                if round(self.config.ratio * self.units[name]) > self._limit(name):
                    raise ConfigError(
                        f"pruning.min_kept: {self.config.min_kept} keeps more of '{name}' ({self.units[name]} units) "
                        f"than the ratio {self.config.ratio} does; use "
                        + ("a smaller one" if self.by_row else "scope: global, or a smaller one")
                    )
        if self.shape.kind == "block":
            self._check_blocks()

    def _check_blocks(self) -> None:
        """Refuses blocks so large that a layer goes as a whole, and warns where one may."""
        blocks, final = f"pruning.granularity: '{self.config.granularity}' is too large", self.config.ratio
        by_layer = self.weights if self.config.scope == "layer" else self.own_ratio
        for name in by_layer:
            units, ratio = self.units[name], self.own_ratio.get(name, final)
            if 0 < units == round(ratio * units):
                raise ConfigError(f"{blocks}: a ratio of {ratio} empties '{name}', that is {units} of them")
        rest = [name for name in self.weights if name not in by_layer]
        single = [name for name in rest if self.units[name] == self._limit(name) == 1]
        if not single or not final:
            return
        more = f" (and {len(single) - 1} more)" if len(single) > 1 else ""
        if round(final * sum(self.units[n] for n in rest)) > sum(min(self._limit(n), self.units[n] - 1) for n in rest):
            raise ConfigError(
                f"{blocks}: '{single[0]}'{more} is one of them, and a ratio of {final} must empty a layer"
            )
        warnings.warn(
            f"{blocks}: '{single[0]}'{more} is one of them, which stays or goes as a whole; min_kept: 1 keeps it",
            stacklevel=4,
        )

    def _limit(self, name: str) -> int:
        """The most units of a layer that may go."""
        least = self.config.min_kept
        kept = least if isinstance(least, int) else math.ceil(least * self.units[name])
        return max(0, self.units[name] - kept)

    def _own_count(self, name: str, target: float) -> int:
        """The count of a layer with a ratio of its own; it grows along the schedule as the target does."""
        final = self.config.ratio
        return round(self.own_ratio[name] * (target / final if final else 1.0) * self.units[name])

    def _layer_count(self, name: str, target: float) -> int:
        return round(target * self.units[name])

    def _select_units(self, target: float, layers: list[LayerScores]) -> dict[str, torch.Tensor]:
        own = [layer for layer in layers if layer.name in self.own_ratio]
        rest = [layer for layer in layers if layer.name not in self.own_ratio]
        gone = select_each(own, {layer.name: self._own_count(layer.name, target) for layer in own})
        if self.config.scope == "layer":
            gone |= select_each(rest, {layer.name: self._layer_count(layer.name, target) for layer in rest})
        elif rest:
            wanted = round(target * sum(layer.units for layer in rest))
            gone |= select(rest, max(wanted, sum(layer.already for layer in rest)))
        return gone

    def _select_rows(
        self, target: float, masks: MaskSet, statistics: dict[str, tuple[torch.Tensor, ...]]
    ) -> dict[str, torch.Tensor]:
        """The same number of weights of every output row, in every layer by the same ratio."""
        gone, totals = {}, self._row_totals(target, masks)
        for name, weight in self.weights.items():
            scores = weight.as_matrix(self._terms(weight, statistics[name], finish=True))
            before = masks.gone(name)
            chosen = select_rows(scores, totals[name], None if before is None else weight.as_matrix(before))
            gone[name] = weight.from_matrix(chosen).contiguous()
        return gone

    def _row_totals(self, target: float, masks: MaskSet) -> dict[str, int]:
        """How many weights of each layer are to be gone; under scope `global` they add up to the exact total."""
        already = {name: int(gone.sum()) if (gone := masks.gone(name)) is not None else 0 for name in self.weights}
        totals = {name: max(self._own_count(name, target), already[name]) for name in self.own_ratio}
        rest = [name for name in self.weights if name not in self.own_ratio]
        if self.config.scope == "layer":
            return totals | {name: max(self._layer_count(name, target), already[name]) for name in rest}
        shares = {name: target * self.units[name] for name in rest}
        counts = {name: max(math.floor(share), already[name]) for name, share in shares.items()}
        more = round(sum(shares.values())) - sum(counts.values())
        room = [name for name in rest if counts[name] < min(math.ceil(shares[name]), self._limit(name))]
        for name in sorted(room, key=lambda name: counts[name] - shares[name])[: max(0, more)]:  # largest remainder
            counts[name] += 1
        return totals | counts

    def _warn_of_equal(self, layers: list[LayerScores], gone: dict[str, torch.Tensor]) -> None:
        """Says where a layer goes as a whole, and where its scores tell nothing apart."""
        name = self.config.criterion_name
        newly = {layer.name: int(gone[layer.name].sum()) for layer in layers}
        open_layers = [layer for layer in layers if newly[layer.name] > layer.already]
        emptied = [layer.name for layer in open_layers if newly[layer.name] == layer.units]
        alike = [layer.name for layer in open_layers if layer.name not in emptied and _all_equal(layer)]
        for found, what in ((emptied, "removes all of"), (alike, "tells nothing apart in")):
            if found:
                more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
                hint = "; min_kept keeps a part of every layer" if found is emptied else ", whose scores are all equal"
                warnings.warn(f"pruning.criterion: '{name}' {what} '{found[0]}'{more}{hint}", stacklevel=5)

    def _select_pattern(
        self, target: float, masks: MaskSet, statistics: dict[str, tuple[torch.Tensor, ...]]
    ) -> dict[str, torch.Tensor]:
        """N:M: the whole pattern at the final target; before it, an exact part of it, the lowest scores first."""
        gone = {}
        final = target >= self.config.ratio
        for name, weight in self.weights.items():
            scores = weight.input_last(self._terms(weight, statistics[name], finish=True))
            before = masks.gone(name)
            before = None if before is None else weight.input_last(before)
            candidates = pattern_candidates(scores, self.shape.kept, self.shape.group, before)
            if final:
                gone[name] = candidates
                continue
            flat = scores.reshape(-1)
            layer = LayerScores(
                name,
                flat.numel(),
                lambda start, stop, flat=flat: flat[start:stop],
                gone=None if before is None else before.reshape(-1),
                candidates=candidates.reshape(-1),
            )
            chosen = select_each([layer], {name: self._layer_count(name, target)})
            gone[name] = chosen[name].view(scores.shape)
        return gone

    def _terms(self, weight: Weight, statistics: tuple[torch.Tensor, ...], finish: bool = False) -> torch.Tensor:
        """The terms of a whole layer, in the weight's shape."""
        value = _scorable(weight.parameter.detach())
        terms = self.criterion.terms(weight.name, value, *statistics)
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
        name, parameter = weight.name, weight.parameter.detach()
        gone = masks.gone(name)
        if self.shape.kind == "block":
            scores = self.criterion.finish(self._block_sums(weight, self._terms(weight, statistics)))
            if gone is not None:
                gone = self._block_sums(weight, (~gone).float()) == 0
        elif not self.criterion.pointwise or not parameter.is_contiguous():
            scores = self._terms(weight, statistics, finish=True).reshape(-1)
        else:
            flat = parameter.view(-1)
            parts = tuple(statistic.reshape(-1) for statistic in statistics)
            checked: set[int] = set()

            def scores_of(start: int, stop: int) -> torch.Tensor:
                part = _scorable(flat[start:stop])
                terms = self.criterion.terms(name, part, *(s[start:stop] for s in parts))
                scores = self.criterion.finish(terms)
                if start not in checked:  # selection looks at every part several times
                    self._check_finite(scores, name)
                    checked.add(start)
                return scores

            scores = None
        if scores is not None:
            scores_of = lambda start, stop, scores=scores: scores[start:stop]  # noqa: E731
        gone = None if gone is None else gone.reshape(-1)
        return LayerScores(name, self.units[name], scores_of, gone=gone, limit=self._limit(name))

    def _block_sums(self, weight: Weight, tensor: torch.Tensor) -> torch.Tensor:
        """Sums over the blocks of a weight-shaped tensor, flat; one cut off by the edge counts as if it were whole."""
        matrix = weight.as_matrix(tensor)
        rows, cols = self.shape.rows, self.shape.cols
        padded = nn.functional.pad(matrix, (0, -matrix.shape[1] % cols, 0, -matrix.shape[0] % rows))
        high, wide = padded.shape[0] // rows, padded.shape[1] // cols
        sums = padded.view(high, rows, wide, cols).sum((1, 3))
        tall = torch.full((high, 1), float(rows), device=sums.device)
        broad = torch.full((1, wide), float(cols), device=sums.device)
        tall[-1], broad[0, -1] = matrix.shape[0] - (high - 1) * rows, matrix.shape[1] - (wide - 1) * cols
        return (sums * (rows * cols / (tall * broad)).to(sums.dtype)).reshape(-1)

    def _expand(self, weight: Weight, units: torch.Tensor) -> torch.Tensor:
        """From a value a unit to a value an element, in the weight's shape."""
        shape = weight.parameter.shape
        if self.shape.kind == "n:m":
            return units.movedim(-1, weight.input_dim).contiguous()
        if self.shape.kind == "weight":
            return units.view(shape)
        height, width = weight.as_matrix(weight.parameter.detach()).shape
        blocks = units.view(-(-height // self.shape.rows), -1)
        matrix = blocks.repeat_interleave(self.shape.rows, 0).repeat_interleave(self.shape.cols, 1)
        return weight.from_matrix(matrix[:height, :width]).contiguous()


def _all_equal(layer: LayerScores) -> bool:
    """Whether all open units of a layer have one score; it looks no further than it must."""
    first: torch.Tensor | None = None
    for _, _, _, scores in layer.chunks(torch.float64):
        if not len(scores):
            continue
        first = scores[0] if first is None else first
        if not bool((scores == first).all()):
            return False
    return layer.units - layer.already > 1


def _scorable(value: torch.Tensor) -> torch.Tensor:
    """The value in at least single precision: half formats would tie and overflow."""
    return value if value.dtype in (torch.float32, torch.float64) else value.float()
