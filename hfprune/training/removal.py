"""Removal: a pruning step of the trainer after which the model is physically smaller."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from hfprune.checkpoint.metadata import annotate, plan_of
from hfprune.checkpoint.rebuild import rebuild, unchanged_on_error
from hfprune.errors import CheckpointError, ConfigError, ModelError
from hfprune.lowrank.pruner import RankPruner
from hfprune.lowrank.ranks import Ranks
from hfprune.masks import MaskSet
from hfprune.structure.choices import Choice, Dense, by_cost, by_ratio
from hfprune.structure.plan import Plan
from hfprune.structure.pruner import StructuredPruner
from hfprune.structure.record import dense_path, followed_by
from hfprune.structure.scores import scored_weights
from hfprune.weights import Weight

if TYPE_CHECKING:
    from hfprune.training.trainer import PruningTrainer

MEASURES = {"ratio": "units", "params": "parameters", "macs": "MACs", "latency": "time"}
"""What a target counts, in words."""


_STATE = {"plan", "shapes", "dense", "kept", "tried", "impossible_blocks"}


class Removal:
    """Scores, selects and removes; `Masking` is its counterpart, with the same methods.

    Raises:
        ConfigError: the target can't be reached.
        ModelError: the model's structure can't be analysed.
    """

    blocks: Sequence[str] = ()
    """The blocks that a strategy's steps take, one a step."""

    def __init__(self, trainer: PruningTrainer):
        self.trainer = trainer
        self.note = ""
        self.base = plan_of(self.model)
        self.given = shapes_of(self.model)
        self.pruner = self._pruner_of(trainer)
        self.pruner.check_reachable(self.targets()[-1])

    def _pruner_of(self, trainer: PruningTrainer) -> AgreedPruner | RankPruner:
        given = (trainer.model, trainer.pruning, example_of(trainer))
        if "rank" in trainer.pruning.granularities:
            options = {"masked": list(trainer.masks), "units": AgreedPruner, "agree": _check_alike}
            return RankPruner(*given, seed=trainer.args.seed, **options)
        return AgreedPruner(*given, seed=trainer.args.seed, trial=False)

    @property
    def model(self) -> nn.Module:
        """What is analysed and cut."""
        return self.trainer.model

    @contextmanager
    def cutting(self) -> Iterator[None]:
        """The model can be cut within."""
        yield

    @property
    def measured(self) -> str:
        """What the targets count."""
        return self.pruner.measured

    @property
    def weights(self) -> dict[str, Weight]:
        """What is scored, by name."""
        self.pruner.look()
        return scored_weights(self.model, self.pruner.groups.values(), self.pruner.criterion)

    def targets(self) -> list[float]:
        """The cumulative fraction gone after each step."""
        return self.pruner.targets()

    def prune_to(self, target: float) -> float:
        """Removes units to a cumulative target, and proves it.

        Returns:
            The fraction that is gone now, of what the target measures.

        Raises:
            ModelError: the processes of a run chose differently, or the removal does not prove equal; nothing is
                changed.
        """
        trainer = self.trainer
        if trainer.optimizer is not None:
            trainer.reset_for_phase()
        trainer.unwrap()  # where nothing was trained there is nothing else to let go, which takes a while
        with self.cutting():
            choice = self._step(target)
            # What is held at zero was cut along with the rest: the zeros that are left say where it is.
            masks = MaskSet.from_zeros(self.model, list(trainer.masks), trainer.masks.pattern)
        trainer.masks = trainer.own_masks(masks).bind(trainer.model)
        trainer.history, self.note = {}, choice.note
        self.annotate(choice.reached)
        return choice.reached

    def _step(self, target: float) -> Choice:
        trainer = self.trainer
        return self.pruner.step(
            target,
            data=trainer.calibration_batches() if self.pruner.needs_data else None,
            loss=trainer.calibration_loss,
            history=trainer.history or None,
        )

    def annotate(self, achieved: float) -> None:
        """Writes what was done into the model's block."""
        trainer, plan = self.trainer, self.pruner.plan
        whole = plan if self.base is None else followed_by(self.base, plan)
        masks = trainer.masks if trainer.shards is None else MaskSet({})  # of shards counted when they are saved
        annotate(self.model, trainer.pruning, masks, achieved, trainer.base_model, whole)

    def logs(self, target: float, achieved: float) -> dict[str, float]:
        """What a step logs."""
        facts = self.facts()
        named = {"units_gone": facts["units_gone"], "params": facts["params"], "macs": facts["macs"]}
        return {f"target_{self.measured}_gone": target, f"{self.measured}_gone": achieved, **named}

    def layers(self) -> dict[str, float]:
        """What a step logs of every group: the fraction of its units that is gone."""
        sizes = self.pruner.group_sizes().items()
        return {f"removed/{name}": 1 - after / max(1, before) for name, (before, after) in sizes}

    def words(self, achieved: float) -> str:
        """What is gone, for a person."""
        pruner = self.pruner
        units = f"{pruner.gone_units():,} of {pruner.total_units:,} units"
        if self.measured == "ratio":
            return f"{units} removed ({achieved:.1%})"
        return f"{achieved:.1%} of the {MEASURES[self.measured]} removed ({units})"

    def facts(self) -> dict[str, Any]:
        """What a step's record says beside target and achieved."""
        gone, costs = self.pruner.gone_units(), self.pruner.costs
        return {
            "measured": self.measured,
            "units_gone": gone,
            "params": round(costs.params()),
            "macs": round(costs.macs()),
            "note": self.note,
        }

    def report(self) -> dict[str, Any]:
        """What the run's report says beside its steps: every group with its units before and after, and the blocks."""
        kinds = self.pruner.dense.kinds
        groups = {
            name: {"kind": kinds.get(name, "channel"), "units": before, "kept": after}
            for name, (before, after) in self.pruner.group_sizes().items()
        }
        return {
            "removed": {
                "measured": self.measured,
                "groups": groups,
                "blocks": self.pruner.dense.blocks,
                "dropped": list(self.pruner.plan.dropped),
            }
        }

    def preview(self, target: float) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a step to a target would leave: its report and its facts. The model is put back as it was."""
        with self.cutting():
            try:
                self.note = self._step(target).note
                return self.report(), self.facts()
            finally:
                self.pruner.undo()

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the weights, so that the model given becomes the small one again."""
        plan = self.pruner.plan
        shapes = shapes_of(self.model).items()
        cut = {name: shape for name, shape in shapes if self.given.get(dense_path(plan, name)) != shape}
        return {"plan": plan.to_dict(), "shapes": cut, **self.pruner.state()}

    def load(self, state: dict[str, Any] | None) -> None:
        """Makes the model given as small as a checkpoint's, whose weights are then still to be loaded.

        Raises:
            CheckpointError: the checkpoint is of another model, or the trainer's is smaller already.
        """
        if not isinstance(state, dict) or not state.keys() >= _STATE:
            raise CheckpointError("the checkpoint does not say what was removed; it is not one of a removal")
        plan = Plan.from_dict(state["plan"])
        shapes = {name: tuple(shape) for name, shape in state["shapes"].items()}
        now = shapes_of(self.model)
        if self.pruner.plan != plan or any(now.get(name) != shape for name, shape in shapes.items()):
            if now != self.given:
                raise CheckpointError("the trainer's model is smaller already; resume with a new one around the "
                                      "model that the run began with")  # fmt: skip
            with unchanged_on_error(self.model):
                rebuild(self.model, plan, shapes)
        self.pruner.load(plan, state)


class AgreedPruner(StructuredPruner):
    """A StructuredPruner that chooses alike in all processes of a run, and goes on from a checkpoint."""

    def look(self) -> None:
        """Analyses the model anew where something was removed."""
        if self._stale:
            self._look()

    def settle(self) -> None:
        """Looks at the model as it is, and lets go of what it was: the steps so far can't be taken back any more."""
        self.look()
        self._journals.clear()

    def targets(self) -> list[float]:
        timed = self.measured == "latency" and self.dense.latency is None
        found = super().targets()
        if timed and self.dense.latency is not None:  # every process measures its own time: the first one's counts
            self.dense.latency = of_the_first(self.dense.latency)
            found = super().targets()
        return found

    def decide(self, target: float, statistics: dict[str, tuple[torch.Tensor, ...]], scores: list[float]) -> Choice:
        if self.measured != "latency":
            choice = super().decide(target, statistics, scores)
            if len(set(gather_object([_digest(choice)]))) > 1:
                raise ModelError("the processes chose different units: their weights or scores differ; "
                                 "nothing was removed")  # fmt: skip
            return choice
        # Every process would time something else: the first one decides for all.
        decided: Choice | ConfigError | ModelError | None = None
        if PartialState().is_main_process:
            try:
                decided = super().decide(target, statistics, scores)
            except (ConfigError, ModelError) as error:
                decided = error
        decided, self.dense.latency = of_the_first((decided, self.dense.latency))
        if isinstance(decided, Exception):
            raise decided
        return decided

    def check_reachable(self, target: float) -> None:
        """Refuses a target that the model can't reach whatever the scores are.

        Raises:
            ConfigError: one line that says how far it can be reached.
        """
        if not self.groups or self.blocks or self.measured == "latency":
            return
        scores = {name: torch.ones(group.units) for name, group in self.groups.items()}
        if self.measured == "ratio":
            by_ratio(self, target, scores, [])
        else:
            by_cost(self, self.measured, 1 - target, scores, [])

    def state(self) -> dict[str, Any]:
        """Plain values that `load` takes back."""
        kept = {name: after for name, (_, after) in self.group_sizes().items()}
        tried = {"tried": self._tried, "impossible_blocks": sorted(self._impossible_blocks)}
        return {"dense": asdict(self.dense), "kept": kept, **tried}

    def load(self, plan: Plan, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state; the model is already as small as the plan says."""
        self.plan, self.dense = plan, Dense(**state["dense"])
        self._kept_counts, self._tried, self._stale = dict(state["kept"]), state["tried"], True
        self._impossible_blocks = set(state["impossible_blocks"])


def _check_alike(ranks: Ranks) -> None:
    if len(set(gather_object([json.dumps(ranks, sort_keys=True)]))) > 1:
        raise ModelError("the processes chose different ranks: their weights or scores differ; nothing was factored")


def example_of(trainer: PruningTrainer) -> Any:
    """One row of the trainer's data as the model takes it, without labels; None where there is no data.

    The same in all processes, and drawn from no generator.
    """
    held = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    if isinstance(held, dict):
        held = next(iter(held.values()), None)
    if held is None:
        return None
    row = held[0] if hasattr(held, "__getitem__") else next(iter(held))
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="example")
    batch = collate([row])
    labels = {"labels", "label", "label_ids", *(trainer.label_names or ())}
    inputs = {name: value for name, value in batch.items() if name not in labels}
    return tuple(inputs.values()) if trainer.plain_module and len(inputs) == 1 else inputs


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's tensors, by name."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def of_the_first(value: Any) -> Any:
    """What the first process has."""
    return broadcast_object_list([value])[0]


def _digest(choice: Choice) -> str:
    units: Iterable[tuple[str, list[int]]] = ((name, units.tolist()) for name, units in sorted(choice.units.items()))
    return hashlib.sha256(json.dumps([list(units), choice.blocks]).encode()).hexdigest()
