"""Subject: a model as criteria look at it, its layers or coupled groups, and what every criterion scores them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from hfprune.config import PruningConfig
from hfprune.criteria import Criterion, check_granularity, create
from hfprune.criteria.calibration import LossFunction, example_inputs_of
from hfprune.errors import ConfigError, ModelError
from hfprune.granularity import parse_granularity
from hfprune.pruner import Pruner
from hfprune.selection import CHUNK, LayerScores, select, select_each, select_rows
from hfprune.strict import one_line
from hfprune.structure.pruner import StructuredPruner

CriterionSpec = str | Mapping[str, Any]
"""A criterion as a recipe has it: its name, or a map of `name` and its parameters."""

Progress = Callable[[str, int, int], None]
"""Told what is done now, and which of how many steps it is, counted from 0."""

_FEW = 5_000_000
"""Up to so many weights the Gaussian model is drawn several times, which steadies its figures for small layers."""


class Subject:
    """A model whose units are scored by several criteria; it is analysed once and never changed.

    Args:
        model: any module.
        granularity: `weight`, `block:RxC` or a structural one other than `layer`, or a list of these; None stands for
            `channel` where the structure can be analysed, else for `weight`.
        criteria: those that will score, for checks before any work.
        example_inputs: for structural granularities, as for `hfprune.prune`.
        data, loss: for criteria that need them.
        include, ignore, reduction, normalize, seed: as in `PruningConfig`.

    Attributes:
        note: why the granularity is another than the usual one; empty where it is not.

    Raises:
        ConfigError: a granularity, pattern or criterion that does not fit.
        ModelError: the model's structure can't be analysed.
    """

    def __init__(
        self,
        model: nn.Module,
        granularity: str | Sequence[str] | None,
        criteria: dict[str, CriterionSpec],
        *,
        data: Any = None,
        loss: LossFunction | None = None,
        example_inputs: Any = None,
        include: Iterable[str] | None = None,
        ignore: Iterable[str] = (),
        reduction: str = "mean",
        normalize: str = "mean",
        seed: int = 0,
    ):
        self.model, self.loss, self.seed, self.note = model, loss, seed, ""
        self.criteria = {label: created(spec, seed) for label, spec in criteria.items()}
        if hasattr(data, "__next__"):  # every criterion scores on the same batches
            data = list(itertools.islice(data, max(c.batches for c in self.criteria.values())))
        self.data = data
        common = {"ignore": list(ignore), "reduction": reduction, "normalize": normalize, "seed": seed, "target": 0.5}
        common["include"] = None if include is None else list(include)
        self.example_inputs = example_inputs_of(data) if example_inputs is None else example_inputs
        self.pruner: Pruner | StructuredPruner
        if granularity is None:
            try:
                self._take(common | {"granularity": "channel"})
            except ModelError as error:
                self._take(common | {"granularity": "weight"})
                self.note = f"single weights, as whole channels can't be looked at: {error}"
        else:
            granularity = granularity if isinstance(granularity, str) else list(granularity)
            self._take(common | {"granularity": granularity})

    @property
    def granularities(self) -> list[str]:
        """What is looked at."""
        return self.pruner.config.granularities

    @property
    def is_structural(self) -> bool:
        """Whether units are those of coupled groups."""
        return isinstance(self.pruner, StructuredPruner)

    @property
    def has_single_weights(self) -> bool:
        """Whether a unit is one weight, so that nothing is averaged in its score."""
        return self.granularities == ["weight"]

    def weights(self) -> dict[str, torch.Tensor]:
        """The tensors that the scores come from, by name; those of one dimension only where there are no others."""
        return {name: weight.parameter.detach() for name, weight in self._weights.items()}

    def scores(self, label: str) -> list[LayerScores]:
        """The scores of every layer or group by one of the criteria; the lowest go first."""
        criterion = self.criteria[label]
        self.pruner.criterion = criterion
        if isinstance(self.pruner, Pruner):
            return self.pruner.layer_scores(data=self.data, loss=self.loss, example_inputs=self.example_inputs)
        return _as_layers(self.pruner.scores(data=self.data, loss=self.loss))

    def goes(self, layer: LayerScores, count: int) -> torch.Tensor:
        """Which units of one layer go when so many do, by the criterion that scored last: a flat bool tensor."""
        if not isinstance(self.pruner, Pruner) or not self.pruner.by_row:
            return select_each([layer], {layer.name: count})[layer.name]
        weight = self.pruner.weights[layer.name]
        scores = weight.as_matrix(layer.scores(0, layer.units).view(weight.parameter.shape))
        return weight.from_matrix(select_rows(scores, count)).reshape(-1)

    def go_together(self, layers: list[LayerScores], ratio: float) -> dict[str, torch.Tensor]:
        """Which units go when all layers are ranked together, by the criterion that scored last.

        A criterion that compares weights within their rows takes of every layer as much.
        """
        if isinstance(self.pruner, Pruner) and self.pruner.by_row:
            return {layer.name: self.goes(layer, round(ratio * layer.units)) for layer in layers}
        return select(layers, round(ratio * sum(layer.units for layer in layers)))

    def gaussian_scores(self, label: str) -> list[list[LayerScores]]:
        """The scores that the same criterion gives to independent Gaussian weights of the same shapes and sizes.

        One list a draw. It is empty for criteria that look at data, as what they would see there depends on more than
        the weights, and for those of norms, which average nothing.
        """
        criterion = self.criteria[label]
        if criterion.statistics or criterion.members == "norms":
            return []
        weights = self.weights()
        draws = 4 if sum(value.numel() for value in weights.values()) <= _FEW else 1
        generator = torch.Generator().manual_seed(self.seed)
        return [self._scores_of_drawn(criterion, list(weights), generator) for _ in range(draws)]

    def _scores_of_drawn(self, criterion: Criterion, names: list[str], generator: torch.Generator) -> list[LayerScores]:
        drawn = copy.deepcopy(self.model)
        with torch.no_grad():
            for name in names:
                parameter = drawn.get_parameter(name)
                size = parameter.float().square().mean().sqrt().item()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
        if isinstance(self.pruner, StructuredPruner):
            self.pruner.criterion = criterion
            return _as_layers(self.pruner.scores(model=drawn))
        pruner = Pruner(drawn, self.pruner.config)
        pruner.criterion = criterion
        return pruner.layer_scores()

    def _take(self, values: dict[str, Any]) -> None:
        kinds = values["granularity"] if isinstance(values["granularity"], list) else [values["granularity"]]
        for kind in kinds:
            if parse_granularity(kind).kind in ("layer", "n:m", "rank"):
                raise ConfigError(f"granularity: '{kind}' has no units to rank in a layer; use channel or weight")
        try:
            config = PruningConfig(**values)
        except ValidationError as error:
            raise ConfigError(one_line(error)) from error
        for label, criterion in self.criteria.items():
            check_granularity(criterion, label, config.granularities)
        if config.is_structural:
            self.pruner = StructuredPruner(self.model, config, self.example_inputs, trial=True)
            self._weights = self.pruner.scored()
        else:
            self.pruner = Pruner(self.model, config)
            self._weights = self.pruner.weights


def created(spec: CriterionSpec, seed: int = 0) -> Criterion:
    """The criterion that a name, or a map of `name` and parameters, stands for.

    Raises:
        ConfigError: an unknown name or parameter.
    """
    if isinstance(spec, str):
        return create(spec, seed=seed)
    if "name" not in spec:
        raise ConfigError("criteria: a map needs the key 'name', e.g. {name: taylor, batches: 8}")
    return create(spec["name"], {key: value for key, value in spec.items() if key != "name"}, seed)


def labels_of(criteria: str | Iterable[CriterionSpec]) -> dict[str, CriterionSpec]:
    """Criteria by the words that they are shown by: the name, with its parameters where some are given.

    Raises:
        ConfigError: none at all, or one that stands twice.
    """
    criteria = [criteria] if isinstance(criteria, str | Mapping) else list(criteria)
    found: dict[str, CriterionSpec] = {}
    for spec in criteria:
        parameters = {} if isinstance(spec, str) else {k: v for k, v in spec.items() if k != "name"}
        name = spec if isinstance(spec, str) else spec.get("name", "")
        label = f"{name}({', '.join(f'{k}={v}' for k, v in parameters.items())})" if parameters else name
        if label in found:
            raise ConfigError(f"criteria: '{label}' stands twice")
        found[label] = spec
    if not found:
        raise ConfigError("criteria: none given; name some, e.g. l1, l2")
    return found


def sampled(units: int, most: int, seed: int) -> torch.Tensor | None:
    """Which of so many units are looked at, ascending and drawn by the seed; None for all of them."""
    if units <= most:
        return None
    return torch.from_numpy(np.sort(np.random.default_rng(seed).choice(units, most, replace=False, shuffle=False)))


def values_at(layer: LayerScores, places: torch.Tensor | None) -> torch.Tensor:
    """The scores of some units, places ascending, float64 on the CPU; None stands for all of them."""
    parts = []
    for start in range(0, layer.units, CHUNK):
        stop = min(start + CHUNK, layer.units)
        scores = layer.scores(start, stop)
        if places is not None:
            low, high = torch.searchsorted(places, torch.tensor([start, stop])).tolist()
            scores = scores[(places[low:high] - start).to(scores.device)]
        parts.append(scores.detach().double().cpu())
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _as_layers(scores: dict[str, torch.Tensor]) -> list[LayerScores]:
    return [
        LayerScores(name, len(value), lambda start, stop, value=value: value[start:stop])
        for name, value in scores.items()
    ]
