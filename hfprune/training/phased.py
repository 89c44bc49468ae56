"""PhasedTrainer: a Trainer whose own loop can be one phase of several, with arguments, optimizer and steps to match."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hfprune.config import PruningConfig
from hfprune.training.distill import DistillingTrainer
from hfprune.training.phases import Phase, PruningState
from hfprune.training.publishing import PublishingTrainer
from hfprune.training.recovery import RecoveryCallback
from hfprune.training.shards.trainer import ShardingTrainer


class PhasedTrainer(DistillingTrainer, PublishingTrainer, ShardingTrainer):
    """What a phase needs of Trainer, and what scoring between two phases needs of its data and loss."""

    pruning: PruningConfig | None
    progress: PruningState
    recovery: RecoveryCallback | None

    def calibration_batches(self) -> Any:
        """A few training batches for the criterion, drawn by the seed apart from training's own order."""
        size = self.pruner.criterion.batches * self._train_batch_size * max(1, self.args.world_size)
        dataset = self.train_dataset
        if hasattr(dataset, "__len__"):
            seed = self.pruning.seed if self.pruning.seed is not None else self.args.seed
            generator = torch.Generator().manual_seed(seed + self.progress.phase + self.progress.reached)
            chosen = torch.randperm(len(dataset), generator=generator)[:size].tolist()
            select = getattr(dataset, "select", None)
            dataset = select(chosen) if select else torch.utils.data.Subset(dataset, chosen)
        return self._get_dataloader(dataset, description="calibration", batch_size=self._train_batch_size)

    def calibration_loss(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """Training's own loss on a batch."""
        with self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(batch))

    @contextmanager
    def phase_arguments(self, phase: Phase) -> Iterator[None]:
        """The arguments as the phase needs them; put back afterwards."""
        changed: dict[str, Any] = {"load_best_model_at_end": False}
        if phase.epochs is not None:
            changed |= {"num_train_epochs": phase.epochs, "max_steps": -1}
        if phase.steps is not None:
            changed["max_steps"] = phase.steps
        record = self.progress.record
        rate = record.learning_rate if record and record.learning_rate is not None else phase.learning_rate
        if rate is not None:
            changed["learning_rate"] = rate
        if self.recovery is not None and self.args.eval_strategy == "no":
            changed["eval_strategy"] = type(self.args.eval_strategy)("epoch")
        before = {name: getattr(self.args, name) for name in changed}
        for name, value in changed.items():
            setattr(self.args, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self.args, name, value)

    def _forget_preparation(self) -> None:
        """Takes off the mark of an evaluation, for which accelerate would wrap nothing: no mixed precision, no DDP."""
        vars(self.model).pop("_is_accelerate_prepared", None)

    def _phase_trains(self, phase: Phase) -> bool:
        return self.train_dataset is not None and (
            self.args.max_steps > 0 or (self.args.max_steps != 0 and self.args.num_train_epochs > 0)
        )

    def unwrap(self) -> None:
        """Takes off what training or evaluating put around the model."""
        self.model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self._forget_preparation()
        self.model_wrapped, self.deepspeed = self.model, None

    def reset_for_phase(self) -> None:
        """A new optimizer, scheduler and wrapper: what Trainer keeps from the phase before holds on to old state."""
        self.unwrap()
        plan = self.pruner.plan if self.pruning.is_structural else None
        self.optimizer, self.lr_scheduler = self._own.renewed(self.optimizer, self.lr_scheduler, self.model, plan)
        self.accelerator.free_memory()
        self.masks.bind(self.model)

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, resume: Any, trial: Any
    ) -> tuple[int, int]:
        """Optimizer steps and logs go on through the phases, so that checkpoints and curves never overlap."""
        self.updates_per_epoch = num_update_steps_per_epoch
        if self.pruning is None:
            return super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial)
        history, offset = self.state.log_history, self.progress.step_offset
        position = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial)
        if resume is None:
            self.state.global_step, self.state.log_history = offset, history
        else:
            done = self.state.global_step - offset
            rest = done % num_update_steps_per_epoch * self.args.gradient_accumulation_steps
            position = (done // num_update_steps_per_epoch, 0 if self.args.ignore_data_skip else rest)
        self.state.max_steps = offset + max_steps
        return position
