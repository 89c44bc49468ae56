"""What a trainer's parts must have for its pruning, checked before any training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfprune.errors import ConfigError

if TYPE_CHECKING:
    from hfprune.training.trainer import PruningTrainer


def check_fits(trainer: PruningTrainer) -> None:
    """Refuses what the trainer's data or the length of its training can't serve.

    Raises:
        ConfigError: patience without evaluation data, a criterion without training data, or a gradual schedule that
            training is too short for.
    """
    config = trainer.pruning
    _check_lengths(trainer)
    if config.recovery.patience is not None and trainer.eval_dataset is None:
        raise ConfigError("pruning.recovery.patience: needs an eval_dataset to watch; or give epochs alone")
    if trainer.pruner.needs_data and trainer.train_dataset is None:
        raise ConfigError(f"pruning.criterion: '{config.criterion_name}' needs a train_dataset; or use 'l1'")


def _check_lengths(trainer: PruningTrainer) -> None:
    phase = trainer.phases[0]
    if not phase.gradual or trainer.train_dataset is None:
        return
    with trainer.phase_arguments(phase):
        length = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    needed = len(phase.gradual) * phase.every
    if needed >= length:
        fitting = max(1, (length - 1) // len(phase.gradual))
        raise ConfigError(
            f"pruning.schedule.every: {phase.every} can't reach the target: {len(phase.gradual)} steps need more than "
            f"{needed} optimizer steps, and training has {length}; use every: {fitting}, or train longer"
        )
