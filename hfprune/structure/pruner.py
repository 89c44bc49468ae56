"""StructuredPruner: which units of a model go at a target, and their removal; the counterpart of Pruner for masks."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from hfprune.config import PruningConfig
from hfprune.criteria import check_granularity, create
from hfprune.criteria.calibration import LossFunction, Progress, gather
from hfprune.criteria.complaints import warn_of_equal
from hfprune.criteria.criterion import WITHOUT_DATA
from hfprune.errors import ConfigError, ModelError
from hfprune.profiling import example_batch
from hfprune.structure.blocks import ResidualBlock, drop_blocks, find_blocks, score_blocks
from hfprune.structure.choices import (
    Choice,
    Dense,
    blocks_alone,
    by_cost,
    by_latency,
    by_ratio,
    choose_blocks,
    milliseconds,
)
from hfprune.structure.costs import Costs
from hfprune.structure.groups import CoupledGroup, Structure, analyse, check_example
from hfprune.structure.plan import Plan
from hfprune.structure.record import dense_path, record_dropped, record_removal
from hfprune.structure.removal import remove
from hfprune.structure.scores import score_groups, scored_members, scored_weights
from hfprune.structure.surgery import Journal
from hfprune.structure.trial import NOT_RUNNING, without_impossible
from hfprune.weights import Weight, check_pattern


class StructuredPruner:
    """What a structured configuration means for a model.

    Args:
        model: any module; only `apply` changes it.
        config: its granularity names structural units.
        example_inputs: as for `measure`; may be left out for transformers and timm models.
        seed: of random scores where the configuration names none.
        dense: of an earlier step; by default the model as it is counts as dense.
        plan: of earlier steps, which `apply` extends.
        trial: find out by trial cuts what the model's code does not let go; otherwise that waits until a cut fails.

    Raises:
        ConfigError: a pattern that matches nothing, a target that can't be reached.
        ModelError: the model's structure can't be analysed, or nothing of it can be removed.
    """

    values: Mapping[str, torch.Tensor] | None = None
    """The parameters' values, where the model on the meta device has none."""

    def __init__(
        self,
        model: nn.Module,
        config: PruningConfig,
        example_inputs: Any = None,
        *,
        seed: int = 0,
        dense: Dense | None = None,
        plan: Plan | None = None,
        trial: bool = False,
    ):
        self.model, self.config, self.example_inputs = model, config, example_inputs
        seed = config.seed if config.seed is not None else seed
        self.criterion = create(config.criterion_name, config.criterion_parameters, seed)
        check_granularity(self.criterion, config.criterion_name, config.granularities)
        self.plan = plan or Plan()
        self.structure: Structure
        self.groups: dict[str, CoupledGroup]
        self.blocks: list[ResidualBlock]
        self._journals: list[Journal] = []
        self._kept_counts: dict[str, int] = {}
        self._impossible_blocks: set[str] = set()
        self._tried = trial
        self._stale = False
        self.dense: Dense | None = dense
        self._look()
        if self.dense is None:
            self.dense = Dense(
                {name: group.units for name, group in self.groups.items()},
                {name: group.kind for name, group in self.groups.items()},
                len(self.blocks),
                self.structure.costs.params(),
                self.structure.costs.macs(),
            )
        self._check()

    @property
    def needs_data(self) -> bool:
        """Whether the criterion runs batches through the model."""
        return self.criterion.needs_data

    @property
    def total_units(self) -> int:
        """How many units the dense model had."""
        return sum(self.dense.units.values()) + self.dense.blocks

    @property
    def measured(self) -> str:
        """What the target counts: `ratio`, `params`, `macs` or `latency`."""
        return self.config.target.kind

    def targets(self) -> list[float]:
        """The cumulative fraction gone after each step; an absolute target becomes a fraction of the dense model.

        Raises:
            ConfigError: the target is more than the dense model has.
        """
        target = self.config.target
        if target.fraction is None and target.kind == "latency" and self.dense.latency is None:
            self.dense.latency = milliseconds(self)
        return self.dense.targets(self.config)

    @property
    def costs(self) -> Costs:
        """What the model as it is costs."""
        if self._stale:
            self._look()
        return self.structure.costs

    def uncut(self) -> list[str]:
        """The reasons that trial cuts found why groups stay whole."""
        return [reason for reason in self.structure.protected if reason.startswith(NOT_RUNNING)]

    def group_sizes(self) -> dict[str, tuple[int, int]]:
        """Group name to its units in the dense model and now."""
        now = {dense_path(self.plan, name): group.units for name, group in self.groups.items()} | self._kept_counts
        dropped = tuple(f"{path}." for path in self.plan.dropped)
        now |= {name: 0 for name in self.dense.units if dropped and f"{name}.".startswith(dropped)}
        return {name: (units, now.get(name, units)) for name, units in self.dense.units.items()}

    def dense_units(self, group: CoupledGroup) -> int:
        """How many units a group of the model as it is had in the dense model."""
        return self.dense.units.get(dense_path(self.plan, group.name), group.units)

    def gone_units(self) -> int:
        """How many of the dense model's units are gone."""
        units = sum(dense - now for dense, now in self.group_sizes().values())
        return units + len(self.plan.dropped)

    def choose(
        self,
        target: float,
        *,
        data: Any = None,
        loss: LossFunction | None = None,
        history: dict[str, torch.Tensor] | None = None,
        progress: Progress | None = None,
    ) -> Choice:
        """What goes at a cumulative target; the model is not changed.

        Args:
            target: the fraction that is gone afterwards: of the units for a ratio, else of the parameters,
                multiply-accumulates or milliseconds of the dense model.
            data, loss, history, progress: for criteria that need them (`criteria.calibration.gather`).
        """
        if self._stale:
            self._look()
        weights = self.scored()
        for block in self.blocks if "layer" in self.config.granularities else ():
            weights |= block.weights(self.model)
        given = {"data": data, "loss": loss, "history": history, "progress": progress}
        statistics = self._statistics(self.model, weights, given)
        blocks = score_blocks(self.structure, self.blocks, self.criterion, statistics, data, progress, self.values)
        return self.decide(target, statistics, blocks)

    def scored(self) -> dict[str, Weight]:
        """The parameters that the criterion scores the groups by."""
        return scored_weights(self.model, self.groups.values(), self.criterion)

    def scores(
        self, *, data: Any = None, loss: LossFunction | None = None, model: nn.Module | None = None
    ) -> dict[str, torch.Tensor]:
        """The score of every unit of the model as it is, by group name, as they are ranked for a ratio.

        Args:
            data, loss: for criteria that need them (`criteria.calibration.gather`).
            model: one of the same structure with other values, to be scored in its place.
        """
        model, groups, config = model or self.model, self.groups.values(), self.config
        weights = scored_weights(model, groups, self.criterion)
        statistics = self._statistics(model, weights, {"data": data, "loss": loss})
        return score_groups(model, groups, self.criterion, statistics, config.reduction, config.normalize)

    def decide(self, target: float, statistics: dict[str, tuple[torch.Tensor, ...]], scores: list[float]) -> Choice:
        """The choice that these statistics of the weights, and scores of the blocks, lead to."""
        blocks = choose_blocks(self, target, scores)
        if not self.groups:
            return blocks_alone(self, target, blocks)
        how = self.config.reduction, self.config.normalize
        units = score_groups(self.model, self.groups.values(), self.criterion, statistics, *how, self.values)
        self._warn_of_equal(units)
        if self.measured == "ratio":
            return by_ratio(self, target, units, blocks)
        if self.measured == "latency":
            return by_latency(self, 1 - target, units, blocks)
        return by_cost(self, self.measured, 1 - target, units, blocks)

    def apply(self, choice: Choice) -> None:
        """Removes what was chosen, either units or blocks, and proves it; or changes nothing.

        Raises:
            ModelError: the removal does not prove equal.
        """
        before = copy.deepcopy(self.plan)
        done = len(self._journals)
        smaller = None
        try:
            if choice.blocks:
                journal, config = drop_blocks(self.structure, choice.blocks)
                self._journals.append(journal)
                record_dropped(self.plan, choice.blocks, config)
            if choice.units:
                removal = remove(self.structure, choice.units)
                self._journals.append(removal.journal)
                record_removal(self.plan, self.model, removal)
                for name, units in choice.units.items():
                    self._kept_counts[dense_path(self.plan, name)] = self.groups[name].units - len(units)
                if "layer" not in self.config.granularities:
                    smaller = self.structure.without(choice.units)
        except BaseException:
            self._take_back(done)
            self.plan = before
            raise
        if smaller is None:
            self._stale = True
        else:
            self._use(smaller)

    def step(
        self,
        target: float,
        *,
        data: Any = None,
        loss: LossFunction | None = None,
        history: dict[str, torch.Tensor] | None = None,
        progress: Progress | None = None,
    ) -> Choice:
        """`choose` and `apply`. Where the model's code does not take the cut, the groups in question are found by trial
        cuts and protected, and the choice is made anew without them."""
        given = {"data": data, "loss": loss, "history": history, "progress": progress}
        choice = self.choose(target, **given)
        try:
            return self._carry_out(choice, target, given)
        except ModelError:
            if not self._look_closer():
                raise
        return self._carry_out(self.choose(target, **given), target, given)

    def undo(self) -> None:
        """Takes back all that `apply` did; the model is as it was given."""
        self._take_back(0)
        self.plan = Plan()
        self._kept_counts.clear()
        self._stale = True

    def restore_point(self) -> Callable[[], None]:
        """What takes back all later steps, once the model's modules are those of now again."""
        done, plan, counts = len(self._journals), copy.deepcopy(self.plan), dict(self._kept_counts)

        def restore() -> None:
            self._take_back(done)
            self.plan, self._kept_counts, self._stale = plan, counts, True

        return restore

    # -- inside --------------------------------------------------------------------------------------------------------

    def _statistics(
        self, model: nn.Module, weights: dict[str, Weight], given: dict[str, Any]
    ) -> dict[str, tuple[torch.Tensor, ...]]:
        example = None
        if set(self.criterion.statistics) & set(WITHOUT_DATA):
            example = example_batch(model, self.example_inputs)
        return gather(self.criterion, model, weights, **given, example_inputs=example, partial=True)

    def _carry_out(self, choice: Choice, target: float, given: dict[str, Any]) -> Choice:
        before, done = copy.deepcopy(self.plan), len(self._journals)
        if not (choice.blocks and choice.units):
            self.apply(choice)
            return choice
        try:  # without the blocks the groups are others, and the units in them cost something else
            self.apply(Choice({}, choice.blocks, choice.reached))
            rest = self.choose(target, **given)
            rest = Choice(rest.units, [], rest.reached, rest.note)
            self.apply(rest)
        except BaseException:
            self._take_back(done)
            self.plan, self._stale = before, True
            self._look()
            raise
        return Choice(rest.units, choice.blocks, rest.reached, rest.note)

    def _warn_of_equal(self, scores: dict[str, torch.Tensor]) -> None:
        """Says where scores tell units nothing apart."""
        alike = [name for name, score in scores.items() if len(score) > 1 and bool((score == score[0]).all())]
        if alike and self.criterion.name != "random":
            warn_of_equal(self.criterion.name, alike)

    def _take_back(self, done: int) -> None:
        while len(self._journals) > done:
            self._journals.pop().rollback()

    def _look_closer(self) -> bool:
        """Analyses the model as it is, with trial cuts; whether that is news, and leaves anything to choose from."""
        if self._tried and not self.structure.already.any():
            return False
        if self.structure.already.any():
            self._look()
        if not self._tried:
            self._try_cuts()
        return bool(self.groups or self.blocks)

    def _try_cuts(self) -> None:
        """Protects what the model's code does not let go."""
        self._tried = True
        self._use(without_impossible(self.structure))
        self._impossible_blocks = {
            dense_path(self.plan, block.path) for block in self.blocks if not self._can_drop(block.path)
        }
        self._use(self.structure)

    def _can_drop(self, path: str) -> bool:
        try:
            journal, _ = drop_blocks(self.structure, [path])
        except ModelError:
            return False
        journal.rollback()
        return True

    def _look(self) -> None:
        """Analyses the model as it is."""
        structure = analyse(self.model, self.example_inputs, even_heads="head_dim" in self.config.granularities)
        self._use(without_impossible(structure) if self._tried else structure)
        self._stale = False

    def _use(self, structure: Structure) -> None:
        kinds = set(self.config.granularities)
        self.structure = structure
        check_example(self.structure)
        wanted = {
            name: group
            for name, group in self.structure.groups.items()
            if ("channel" in kinds or group.kind in kinds) and group.units > 1 and self._known(group)
        }
        include, ignore = self.config.include, self.config.ignore
        self.groups = {
            name: group
            for name, group in wanted.items()
            if (include is None or _touches(group, include)) and not _touches(group, ignore)
        }
        self.blocks = find_blocks(self.structure) if "layer" in kinds else []
        self.blocks = [
            block for block in self.blocks if dense_path(self.plan, block.path) not in self._impossible_blocks
        ]

    def _known(self, group: CoupledGroup) -> bool:
        """Whether the dense model had it: the last head of a layer, cut inside, would look like another group."""
        return self.dense is None or self.dense.kinds.get(dense_path(self.plan, group.name)) == group.kind

    def _check(self) -> None:
        config = self.config
        for key in ("include", "ignore"):
            for pattern in getattr(config, key) or ():
                check_pattern(self.model, pattern, f"pruning.{key}")
        names = [member.tensor for group in self.groups.values() for member in group.members] + list(self.groups)
        for pattern in config.per_layer if isinstance(config.per_layer, dict) else ():
            check_pattern(self.model, pattern, "pruning.per_layer", names)
        if isinstance(config.per_layer, list) and len(config.per_layer) != len(self.groups):
            raise ConfigError(
                f"pruning.per_layer: {len(config.per_layer)} ratios, but there are {len(self.groups)} groups; "
                f"`hfprune inspect` lists them"
            )
        if not self.groups and not self.blocks:
            kinds = sorted({group.kind for group in self.structure.groups.values()})
            raise ConfigError(
                f"pruning.granularity: the model has nothing of {config.granularities} that can be removed; "
                f"it has {', '.join(kinds) or 'no coupled groups'}"
            )
        scored_members(self.model, self.groups.values(), self.criterion)


def _touches(group: CoupledGroup, patterns: list[str]) -> bool:
    """Whether a pattern names the group, one of its tensors, or a module around one of them."""
    names = {group.name, *(member.tensor for member in group.members)}
    paths = {".".join(name.split(".")[:n]) for name in names for n in range(1, name.count(".") + 2)}
    return any(fnmatch.fnmatchcase(path, pattern) for path in paths for pattern in patterns)
