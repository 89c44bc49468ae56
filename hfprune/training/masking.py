"""Masking: a pruning step of the trainer that holds weights at zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from hfprune.checkpoint.metadata import annotate
from hfprune.errors import ModelError
from hfprune.masks import MaskSet
from hfprune.originals import Originals
from hfprune.pruner import Pruner
from hfprune.sharded import ShardedPruner
from hfprune.training.removal import example_of
from hfprune.weights import Weight

if TYPE_CHECKING:
    from hfprune.training.trainer import PruningTrainer


class Masking:
    """Scores, selects and masks; `Removal` is its counterpart, with the same methods."""

    measured = "ratio"
    """What the targets count."""
    blocks: Sequence[str] = ()
    """The blocks that a strategy's steps take, one a step."""

    def __init__(self, trainer: PruningTrainer):
        self.trainer = trainer
        given = (trainer.model, trainer.pruning)
        if trainer.shards is None:
            self.pruner = Pruner(*given, seed=trainer.args.seed)
        else:
            self.pruner = ShardedPruner(*given, trainer.shards.across, seed=trainer.args.seed)

    @property
    def weights(self) -> dict[str, Weight]:
        """What is scored, by name."""
        return self.pruner.weights

    def targets(self) -> list[float]:
        """The cumulative fraction gone after each step."""
        return self.trainer.pruning.targets()

    def prune_to(self, target: float) -> float:
        """Prunes to a cumulative target.

        Returns:
            The fraction that is gone now.

        Raises:
            ModelError: the processes of a run chose differently; nothing is changed.
        """
        masks = self._masks_at(target)
        self.trainer.masks = masks.apply(self.trainer.model)
        achieved = self._gone_at(target, masks) / self.pruner.total_units
        self.annotate(achieved)
        return achieved

    def _gone_at(self, target: float, masks: MaskSet) -> int:
        """How many units are gone at a target."""
        return max(self.pruner.wanted(target), self.pruner.gone(masks))

    def _masks_at(self, target: float) -> MaskSet:
        """The masks at a cumulative target; a criterion that visits layers has pruned the model by them already."""
        trainer = self.trainer
        given: dict[str, Any] = {
            "data": trainer.calibration_batches() if self.pruner.needs_data else None,
            "loss": trainer.calibration_loss,
        }
        if self.pruner.visits:
            with Originals() as originals:
                try:
                    return _alike(self.pruner.visit(target, trainer.masks, originals, **given))
                except BaseException:
                    originals.restore()
                    raise
        if "synaptic_flow" in self.pruner.criterion.statistics:
            given["example_inputs"] = example_of(trainer)
        found = self.pruner.select(target, trainer.masks, history=trainer.history or None, **given)
        return found if trainer.shards is not None else _alike(found)  # of shards every process has others

    def annotate(self, achieved: float) -> None:
        """Writes what was done into the model's block."""
        trainer = self.trainer
        if trainer.shards is not None:  # the zeros of whole tensors are counted when they are saved
            model = trainer.shards.skeleton
            annotate(model, trainer.pruning, MaskSet({}), achieved, trainer.base_model)
            return
        annotate(trainer.model, trainer.pruning, trainer.masks, achieved, trainer.base_model)

    def logs(self, target: float, achieved: float) -> dict[str, float]:
        """What a step logs."""
        masks = self.trainer.masks
        return {"target_sparsity": target, "sparsity": masks.zeros / max(1, masks.numel)}

    def layers(self) -> dict[str, float]:
        """What a step logs of every layer: the fraction of its weights that is zero."""
        found = self.trainer.masks.sparsity().items()
        return {f"sparsity/{name}": sparsity.zeros / max(1, sparsity.numel) for name, sparsity in found}

    def words(self, achieved: float) -> str:
        """What is gone, for a person."""
        return f"{achieved:.1%} pruned"

    def facts(self) -> dict[str, Any]:
        """What a step's record says beside target and achieved."""
        return {}

    def report(self) -> dict[str, Any]:
        """What the run's report says beside its steps."""
        return {}

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint holds beside the masks."""
        return None

    def load(self, state: dict[str, Any] | None) -> None:
        """Takes up what `state` gave."""


def _alike(masks: MaskSet) -> MaskSet:
    """The masks, where all processes of a run chose the same."""
    if len(set(gather_object([masks.digest()]))) > 1:
        raise ModelError("the processes chose different masks: their weights or scores differ; nothing was pruned")
    return masks
