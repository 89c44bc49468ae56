"""RankPruner: the counterpart of StructuredPruner where weights are factored, alone or after units are removed."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from hfprune.config import PruningConfig
from hfprune.criteria import check_granularity, create
from hfprune.criteria.calibration import LossFunction, Progress, gather
from hfprune.errors import ConfigError, ModelError
from hfprune.lowrank.components import Components, components_of
from hfprune.lowrank.factor import (
    factored_layers,
    factored_like,
    factored_ranks,
    fill,
    largest_rank,
    matrix_shape,
    merged,
    put,
)
from hfprune.lowrank.layers import Layer, candidate, layers_of
from hfprune.lowrank.measures import CurrentCosts
from hfprune.lowrank.proof import prove
from hfprune.lowrank.ranks import Candidate, Ranks, choose, smallest, total
from hfprune.structure.choices import TOLERANCE, Choice, Dense
from hfprune.structure.plan import Plan
from hfprune.structure.pruner import StructuredPruner
from hfprune.structure.record import dense_path
from hfprune.structure.surgery import Journal
from hfprune.weights import check_pattern

MEASURED = {"ratio": "components", "params": "parameters", "macs": "MACs"}


class RankPruner:
    """What a configuration with the granularity `rank` means for a model; it has the methods of `StructuredPruner`.

    Every step begins by merging what is factored; with other granularities beside `rank`, units are removed next; then
    the weights are taken apart, components are chosen, layers are factored and the result is proved. A rank never
    grows.

    Args:
        model: any module; only `step` changes it.
        config: its granularity is `rank`, or a list with it.
        example_inputs: as for `measure`; may be left out for transformers and timm models.
        seed: of random scores where the configuration names none.
        masked: names of tensors that are held at zero somewhere, which factors would not be.
        units: the class that removes units.
        agree: told of every choice; raises where processes disagree.

    Raises:
        ConfigError: a pattern that matches nothing, a target that can't be reached, nothing that can be factored.
        ModelError: the model can't take the inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PruningConfig,
        example_inputs: Any = None,
        *,
        seed: int = 0,
        masked: Iterable[str] = (),
        units: type[StructuredPruner] = StructuredPruner,
        agree: Callable[[Ranks], None] = lambda ranks: None,
    ):
        self.model, self.config, self.example_inputs, self.agree = model, config, example_inputs, agree
        seed = config.seed if config.seed is not None else seed
        self.criterion = create(config.criterion_name, config.criterion_parameters, seed)
        check_granularity(self.criterion, config.criterion_name, config.granularities)
        others = [kind for kind in config.granularities if kind != "rank"]
        self.inner: StructuredPruner | None = None
        if others:
            changes = {"granularity": others, "target": config.target, "export_sizes": None}
            with self._dense():
                self.inner = units(model, config.model_copy(update=changes), example_inputs, seed=seed)
        for key in ("include", "ignore"):
            for pattern in getattr(config, key) or ():
                check_pattern(model, pattern, f"pruning.{key}")
        self.groups: dict[str, Any] = self.inner.groups if self.inner else {}
        self._ranks: dict[str, int] = factored_ranks(model, Plan())
        self._journals: list[tuple[Journal, dict[str, int]]] = []
        self._costs: CurrentCosts | None = None
        with self._dense():
            layers = layers_of(self.model, self.config, self.example_inputs)
        self._check(layers, set(masked))
        self._full = {layer.path: self._ranks.get(layer.path, min(matrix_shape(layer.module))) for layer in layers}
        units_now = self.inner.dense.units if self.inner else {}
        kinds = self.inner.dense.kinds if self.inner else {}
        self._names = {path: f"{path} (rank)" if path in units_now else path for path in self._full}
        self.dense = Dense(
            units_now | {self._names[path]: full for path, full in self._full.items()},
            kinds | dict.fromkeys(self._names.values(), "rank"),
            self.inner.dense.blocks if self.inner else 0,
            self.costs.params(),
            self.costs.macs(),
        )
        if config.target.kind == "macs" and not self.dense.macs:
            raise ConfigError("pruning.target.macs: the model's multiply-accumulates can't be counted; give params")

    @property
    def needs_data(self) -> bool:
        """Whether the criterion runs batches through the model."""
        return self.criterion.needs_data

    @property
    def measured(self) -> str:
        """What the target counts: `ratio`, `params` or `macs`."""
        return self.config.target.kind

    @property
    def total_units(self) -> int:
        """How many units the dense model had, components included."""
        return sum(self.dense.units.values()) + self.dense.blocks

    @property
    def plan(self) -> Plan:
        """The record of what was done so far."""
        plan = self.inner.plan if self.inner else Plan()
        return replace(plan, factored=factored_ranks(self.model, plan))

    @property
    def costs(self) -> CurrentCosts:
        """What the model as it is costs."""
        if self._costs is None:
            self._costs = CurrentCosts(self.model, self.example_inputs)
        return self._costs

    def targets(self) -> list[float]:
        """As `StructuredPruner.targets`."""
        return self.dense.targets(self.config)

    def group_sizes(self) -> dict[str, tuple[int, int]]:
        """Group or layer to its units or components in the dense model and now; a dense layer has all of its own."""
        units = self.inner.group_sizes() if self.inner else {}
        gone = tuple(f"{path}." for path in self.plan.dropped)
        now = {
            path: 0 if gone and path.startswith(gone) else self._ranks.get(path, n) for path, n in self._full.items()
        }
        return units | {self._names[path]: (full, now[path]) for path, full in self._full.items()}

    def gone_units(self) -> int:
        """How many units and components are gone."""
        sizes = self.group_sizes().values()
        return sum(before - now for before, now in sizes) + len(self.plan.dropped)

    def uncut(self) -> list[str]:
        """As `StructuredPruner.uncut`."""
        return self.inner.uncut() if self.inner else []

    def look(self) -> None:
        """As `AgreedPruner.look`; layers are looked at in every step."""

    def check_reachable(self, target: float) -> None:
        """Refuses a target that can't be reached whatever the scores are.

        Raises:
            ConfigError: one line that says how far it can be reached.
        """
        if self.inner is not None:
            return
        with self._dense():
            layers = layers_of(self.model, self.config, self.example_inputs)
            self._choose(target, layers, {layer.path: np.ones(min(matrix_shape(layer.module))) for layer in layers})

    def step(
        self,
        target: float,
        *,
        data: Any = None,
        loss: LossFunction | None = None,
        history: dict[str, torch.Tensor] | None = None,
        progress: Progress | None = None,
    ) -> Choice:
        """Brings the model to a cumulative target, as `StructuredPruner.step`; if it raises, the model is unchanged.

        Raises:
            ConfigError: the target can't be reached.
            ModelError: scores that are not finite, a model that does not prove equal.
        """
        journal, before = Journal(), dict(self._ranks)
        given = {"data": data, "loss": loss, "progress": progress}
        try:
            for layer in factored_layers(self.model).values():
                self._put(layer, merged(layer), journal)
            choice = self._remove_units(target, given | {"history": history}, journal)
            layers = layers_of(self.model, self.config, self.example_inputs)
            weights = {layer.weight.name: layer.weight for layer in layers}
            statistics = gather(self.criterion, self.model, weights, **given, partial=True)
            parts = {
                layer.path: self._components(layer, statistics[layer.weight.name])
                for layer in layers
                if layer.weight.name in statistics
            }
            unseen = [layer.path for layer in layers if layer.path not in parts and self._key(layer) in before]
            if unseen:
                raise ModelError(f"pruning.criterion: '{self.criterion.name}' can't score '{unseen[0]}': it took no "
                                 f"part in any calibration batch")  # fmt: skip
            layers = [layer for layer in layers if layer.path in parts]
            scores = {path: part.scores.double().cpu().numpy() for path, part in parts.items()}
            ranks, reached, note = self._choose(target, layers, scores)
            self.agree(ranks)
            self._factor(layers, parts, ranks, journal)
            prove(self.model, self.example_inputs)
        except BaseException:
            journal.rollback()
            self._ranks = before
            raise
        finally:
            self._costs = None
        self._journals.append((journal, before))
        return Choice(choice.units, choice.blocks, reached, note)

    def undo(self) -> None:
        """Takes back all that `step` did; the model is as it was given."""
        while self._journals:
            journal, self._ranks = self._journals.pop()
            journal.rollback()
        self._costs = None

    def state(self) -> dict[str, Any]:
        """Plain values that `load` takes back."""
        own = {"dense": asdict(self.dense), "kept": {}, "tried": False, "impossible_blocks": []}
        return own | {"full": dict(self._full), "units": self.inner.state() if self.inner else None}

    def load(self, plan: Plan, state: dict[str, Any]) -> None:
        """Goes on from a saved state; the model is already as small as the plan says."""
        self.dense, self._full, self._costs = Dense(**state["dense"]), dict(state["full"]), None
        self._ranks = dict(plan.factored)
        if self.inner is not None:
            self.inner.load(replace(plan, factored={}), state["units"])

    # -- inside --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _dense(self) -> Iterator[None]:
        """The model with products in the place of factors, for a while."""
        journal = Journal()
        try:
            for layer in factored_layers(self.model).values():
                self._put(layer, merged(layer), journal)
            yield
        finally:
            journal.rollback()

    def _put(self, old: nn.Module, new: nn.Module, journal: Journal) -> None:
        put(self.model, old, new)
        journal.add(lambda: put(self.model, new, old))

    def _check(self, layers: list[Layer], masked: set[str]) -> None:
        config = self.config
        if not layers:
            raise ConfigError("pruning.granularity: the model has no linear layer or convolution that can be factored; "
                              "grouped and transposed convolutions and shared weights can't")  # fmt: skip
        for pattern in config.per_layer:
            check_pattern(self.model, pattern, "pruning.per_layer", [layer.weight.name for layer in layers])
        for layer in layers:
            zeros = [name for name in masked if name.startswith(f"{layer.path}.")]
            if zeros:
                raise ConfigError(f"pruning.granularity: '{zeros[0]}' is held at zero where it was pruned, and factors "
                                  f"would fill that; factor first, or ignore '{layer.path}'")  # fmt: skip

    def _remove_units(self, target: float, given: dict[str, Any], journal: Journal) -> Choice:
        """Removes units from the merged model, by the share 1 - sqrt(left) of the target: so units and components both
        cut by like factors."""
        if self.inner is None:
            return Choice({}, [], 0.0)
        journal.add(self.inner.restore_point())
        try:
            return self.inner.step(1 - math.sqrt(1 - target), **given)
        except ConfigError as error:
            raise ConfigError(f"{error} (units take the root of what is to be left, components the rest)") from error

    def _components(self, layer: Layer, statistics: tuple[torch.Tensor, ...]) -> Components:
        most = min(largest_rank(layer.module), self._ranks.get(self._key(layer), sys.maxsize))
        return components_of(
            self.criterion, layer.weight.name, layer.module, statistics, self.config.normalize, most=most
        )

    def _key(self, layer: Layer) -> str:
        """The layer's path in the dense model."""
        return dense_path(self.inner.plan, layer.path) if self.inner else layer.path

    def _choose(self, target: float, layers: list[Layer], scores: dict[str, np.ndarray]) -> tuple[Ranks, float, str]:
        """The ranks for a target; the model is dense now. With them the fraction that is gone, and a note."""
        found = [self._candidate(layer, scores[layer.path], target) for layer in layers]
        candidates = [candidate for candidate in found if candidate is not None]
        kind = self.measured
        if kind == "ratio":
            dense = float(sum(self._full.values()))
            whole = dense - sum(c.full for c in candidates)
        else:
            dense = getattr(self.dense, kind)
            whole = getattr(CurrentCosts(self.model, self.example_inputs), kind)() - sum(c.whole for c in candidates)
        left = 1 - target
        least = (whole + total(candidates, smallest(candidates))) / dense
        if least > left * (1 + TOLERANCE):
            what = "components" if kind == "ratio" else "dense model"
            raise ConfigError(
                f"pruning.target.{kind}: {left:.2%} of the {what} can't be reached; what is not factored and the "
                f"smallest ranks are {least:.2%}"
            )
        ranks = choose(candidates, left * dense - whole, self.config.scope, counted=kind == "ratio")
        reached = (whole + total(candidates, ranks)) / dense
        note = ""
        if abs(reached - left) > TOLERANCE * left:
            note = f"{reached:.2%} of the {MEASURED[kind]} instead of {left:.2%}: ranks in steps of "
            note += f"{self.config.round_to}, and layers stay dense where factoring does not pay"
        return ranks, 1 - reached, note

    def _candidate(self, layer: Layer, scores: np.ndarray, target: float) -> Candidate | None:
        key, rows_columns = self._key(layer), matrix_shape(layer.module)
        full = self._full.get(key, min(rows_columns))
        # Along the schedule a layer with a ratio of its own is cut as the whole is.
        share = target / self.config.ratio if self.config.target.fraction else 1.0
        return candidate(layer, scores, self.config, full, self._ranks.get(key), share)

    def _factor(self, layers: list[Layer], parts: dict[str, Components], ranks: Ranks, journal: Journal) -> None:
        for layer in layers:
            own = parts.pop(layer.path)
            rank = ranks.get(layer.path)
            if rank is not None:
                small = factored_like(layer.module, rank)
                fill(small, own.left[:, :rank], own.right[:rank])
                self._put(layer.module, small, journal)
        self._ranks = factored_ranks(self.model, self.inner.plan if self.inner else Plan())


def pruner_for(
    model: nn.Module, config: PruningConfig, example_inputs: Any = None, *, masked: Iterable[str] = ()
) -> StructuredPruner | RankPruner:
    """The pruner that a structural configuration asks for.

    Args:
        model, config, example_inputs: as either takes them.
        masked: names of tensors that are held at zero somewhere.
    """
    if "rank" in config.granularities:
        return RankPruner(model, config, example_inputs, masked=masked)
    return StructuredPruner(model, config, example_inputs)
