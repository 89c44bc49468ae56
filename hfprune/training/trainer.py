"""PruningTrainer: transformers' Trainer with pruning between its fine-tuning phases, or inside one."""

from __future__ import annotations

import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput

from hfprune.checkpoint.metadata import block_of, masks_from_block
from hfprune.checkpoint.torch_prune import refuse_torch_prune
from hfprune.config import PruningConfig
from hfprune.errors import ConfigError
from hfprune.masks import MaskSet
from hfprune.pruner import Pruner
from hfprune.structure.graph import settled
from hfprune.structure.pruner import StructuredPruner
from hfprune.training.callbacks import (
    CountingCallback,
    GradualCallback,
    LiveParametersCallback,
    MaskCallback,
    MovementCallback,
    SaveAfterEpochEnd,
)
from hfprune.training.checkpoints.state import load_state, save_state, signature_of
from hfprune.training.checks import check_fits
from hfprune.training.choice import decide
from hfprune.training.collapse import Guard
from hfprune.training.family import export_size
from hfprune.training.ice.blockwise import method_of
from hfprune.training.ice.course import IceCourse
from hfprune.training.logs import RunCallbacks, step_logs
from hfprune.training.optimizer import OwnOptimizer
from hfprune.training.phased import PhasedTrainer
from hfprune.training.phases import Phase, PruningState, StepRecord, numbers, phases_of
from hfprune.training.progress import PhaseProgress, tell
from hfprune.training.publishing import check_pushing
from hfprune.training.recovery import RecoveryCallback, monitored
from hfprune.training.shards.trainer import check_pruning
from hfprune.training.world import check_world


class PruningTrainer(PhasedTrainer):
    """A Trainer that prunes: `train()` runs one phase of ordinary training after every pruning step.

    Everything that Trainer does (losses, mixed precision, accumulation, callbacks, loggers, `compute_metrics`) stays
    as it is. A phase lasts as `pruning.recovery` says, or else `args`. Optimizer and scheduler are new in every phase,
    masked weights stay zero whatever the optimizer, removals come before a phase, which ends on its best weights.

    Example:
        >>> trainer = PruningTrainer(
        ...     model=model, args=TrainingArguments("out", num_train_epochs=3), train_dataset=train, eval_dataset=test,
        ...     pruning=PruningConfig(criterion="taylor", target=0.8, schedule={"kind": "hybrid", "steps": 3}))
        >>> trainer.train()                               # resume_from_checkpoint=True goes on after an interruption
        >>> trainer.save_model("pruned")

    Args:
        model, args, others: as Trainer takes them. `args` are copied, not changed. A plain module that takes inputs and
            returns logits is trained with the loss that its labels call for.
        pruning: what, how much and when to prune; without it, this is a Trainer with safer checkpoints.
        base_model: the Hub name of the dense model, for the metadata.
        push_every_step: push each pruning step once it is fine-tuned, as a commit with a tag such as `ratio-0.8`.

    Attributes:
        masks: what is held at zero.
        steps: one `StepRecord` a pruning step; `choice`: what the schedule `auto` became, and why.
        saving: options of `save_pretrained` for the checkpoint of each of `export_sizes`.

    Raises:
        ConfigError: the configuration does not fit the model, the data or the length of training; before any training.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *others: Any,
        pruning: PruningConfig | dict[str, Any] | None = None,
        base_model: str | None = None,
        push_every_step: bool = False,
        **kwargs: Any,
    ):
        if model is not None and kwargs.get("model_init") is not None:
            raise ConfigError("model_init: PruningTrainer prunes the model it is given; pass model only")
        if model is not None:
            refuse_torch_prune(model)
        super().__init__(model, args, *others, **kwargs)
        check_world(self.args)
        self.callback_handler = RunCallbacks.of(self.callback_handler)
        self.pruning = PruningConfig(**pruning) if isinstance(pruning, dict) else pruning
        self.base_model, self.push_every_step, self.choice = base_model, push_every_step, ""
        self.saving: dict[str, Any] = {}
        check_pushing(self)
        check_pruning(self)
        self.masks, self.progress = MaskSet({}), PruningState()
        self.history: dict[str, torch.Tensor] = {}
        self.phases: list[Phase] = []
        self.recovery: RecoveryCallback | None = None
        self.course: IceCourse | None = None
        self.guard: Guard | None = None
        if block := block_of(self.model):
            # A pruned model stays pruned, whatever is trained.
            self.masks = masks_from_block(self.model, block).bind(self.model)
        # The masks come first: whoever looks at the weights after a step sees them pruned.
        self.callback_handler.callbacks.insert(0, MaskCallback(self))
        if self.pruning is not None:
            self._prepare_pruning()
        self.add_callback(SaveAfterEpochEnd(self))
        for shown, bars in ((ProgressCallback, True), (PrinterCallback, False)):
            if self.pop_callback(shown) is not None:
                self.add_callback(PhaseProgress(self, bars=bars))

    @property
    def steps(self) -> list[StepRecord]:
        """What each pruning step did so far."""
        return self.progress.records

    @property
    def achieved(self) -> float:
        """The fraction that is gone now, of what the target measures."""
        return self.progress.record.achieved if self.progress.record else 0.0

    @property
    def pruner(self) -> Pruner | StructuredPruner:
        """What the configuration means for the model."""
        return self.method.pruner

    def _prepare_pruning(self) -> None:
        self.pruning, self.choice = decide(self.pruning, self.model, self.args, self.train_dataset)
        config = self.pruning
        self.given_model = signature_of(self.model)
        self.method = method_of(self)
        self.phases = phases_of(config, self.method.targets(), self.method.blocks)
        check_fits(self)
        self._own = OwnOptimizer(self.optimizer, self.lr_scheduler, self.model, config.is_structural)
        self.add_callback(LiveParametersCallback(self.optimizer is not None, self.is_deepspeed_enabled))
        if self.eval_dataset is not None:
            self.recovery = RecoveryCallback(config.recovery, *monitored(config.recovery, self.args, self.eval_dataset))
            self.add_callback(self.recovery)
        self.guard = Guard(self) if config.recovery.max_drop is not None else None
        self.course = IceCourse(self, PruningTrainer) if config.strategy is not None else None
        self.callback_handler.callbacks.insert(1, CountingCallback(self))
        self.callback_handler.callbacks.insert(2, GradualCallback(self))
        if "movement" in self.pruner.criterion.statistics:
            self.callback_handler.callbacks.insert(0, MovementCallback(self))

    # ---- the way through the phases -----------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Prunes and fine-tunes through all phases.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the last whole one in `args.output_dir`; a run that
                was interrupted ends with the same masks and metric as one that was not.
            trial, ignore_keys_for_eval: as in Trainer.

        Returns:
            Trainer's output over all phases: the optimizer steps, the mean loss, and the last phase's metrics.
        """
        if self.pruning is None:
            self._forget_preparation()
            return super().train(resume_from_checkpoint or None, trial, ignore_keys_for_eval)
        folder = self.find_checkpoint(resume_from_checkpoint)
        self.callback_handler.begin_run(self.args, self.state, self.control)
        self._begin(folder, ignore_keys_for_eval)
        outputs: list[TrainOutput] = []
        with settled():
            while self.progress.phase < len(self.phases):
                outputs += self._run_phase(folder, trial, ignore_keys_for_eval)
                folder = None
                if self.progress.ended or self.progress.phase + 1 == len(self.phases):
                    break
                self.progress.phase += 1
                self.progress.done = False
        last = self.phases[-1]
        if self.progress.reached < len(last.gradual):
            short = f"{self.achieved:.1%} pruned, before the schedule reached {last.target:.1%}"
            warnings.warn(f"training ended at {short}", stacklevel=2)
        self.callback_handler.end_run(self.args, self.state, self.control)
        metrics = dict(outputs[-1].metrics) if outputs else {}
        losses = [output.training_loss for output in outputs]
        return TrainOutput(self.state.global_step, sum(losses) / len(losses) if losses else 0.0, metrics)

    def _begin(self, folder: str | None, ignore_keys: list[str] | None) -> None:
        """Takes up a checkpoint, or begins anew."""
        self.begin_sharding()
        self.progress = PruningState()
        if self.pruning.recovery.distill is not None:
            self.begin_teaching(self.pruning.recovery.distill)
            self.progress.teacher = self.teacher.digest
            tell(self, self.teacher.words())
        if folder is None:
            if self.course is not None:
                self.course.begin(ignore_keys)
            if self.guard is not None:
                self.guard.begin(ignore_keys)
            return
        weights = load_state(self, Path(folder))
        targets = self.progress.targets or self.method.targets()
        self.phases = phases_of(self.pruning, targets, self.method.blocks)
        if self.progress.record is not None:
            # Loading looks at what the model says of itself.
            self.method.annotate(self.achieved)
        if self.recovery is not None:
            patience = self.phases[self.progress.phase].patience
            self.recovery.load(self.progress.best, weights, patience)
        if self.progress.done or self._out_of_patience():
            self._load_from_checkpoint(folder)
            self.state = type(self.state).load_from_json(str(Path(folder) / "trainer_state.json"))
            self.state.is_world_process_zero = self.is_world_process_zero()
            self.state.is_local_process_zero = self.is_local_process_zero()
            self.method.annotate(self.achieved)
        self.masks.bind(self.model)

    def _out_of_patience(self) -> bool:
        """Whether the phase that was taken up would have ended with the evaluation before its checkpoint."""
        return self.recovery is not None and self.recovery.exhausted

    def _run_phase(self, folder: str | None, trial: Any, ignore_keys: list[str] | None) -> list[TrainOutput]:
        phase = self.phases[self.progress.phase]
        if self.progress.done:
            return []
        began = time.perf_counter() - (self.progress.record.seconds if folder and self.progress.record else 0.0)
        set_seed(self.args.seed + phase.number)
        if folder is None:
            self._open_phase(phase, ignore_keys)
        outputs, course = [], self.course
        # A phase that is taken up was being fine-tuned.
        wanted = course is None or folder is not None or course.fine_tunes(phase, self.progress.record)
        wanted = wanted and not (folder is not None and self._out_of_patience())
        with self.phase_arguments(phase), course.fine_tuning() if course else nullcontext():
            if wanted and self._phase_trains(phase):
                self.reset_for_phase()
                self._began = began
                outputs.append(super().train(folder, trial, ignore_keys))
                # What trained on is in the model's own memory now, also where a wrapper held it.
                self.masks.bind(self.model).clean()
                if folder is not None:  # what was said of the model before its weights were loaded
                    self.method.annotate(self.achieved)
            self._close_phase(phase, began, ignore_keys)
            stands = self.guard is None or self.guard.check()
            if stands:
                export_size(self, phase)
            if self.args.save_strategy != "no":
                self.save_without_optimizer(trial)
            if stands:
                self.push_step(phase)
        return outputs

    def _open_phase(self, phase: Phase, ignore_keys: list[str] | None) -> None:
        """Prunes to the phase's target, and sees what that cost."""
        if self.recovery is not None:
            self.recovery.begin(phase.patience)
            self.recovery.active = not phase.gradual
        if phase.gradual:
            self.progress.record = StepRecord(phase.number, 0.0, 0.0)
            return
        achieved = self._prune_to(phase.target)
        record = StepRecord(phase.number, phase.target, achieved, **self.method.facts())
        self.progress.record = record
        if self.recovery is not None:
            metrics = self.evaluate(ignore_keys=ignore_keys)
            record.metric_before = numbers(metrics)
            self.recovery.observe(metrics, self.model, self.state.global_step)
            self.recovery.waited = 0

    def _close_phase(self, phase: Phase, began: float, ignore_keys: list[str] | None) -> None:
        record, step = self.progress.record, self.state.global_step
        if self.recovery is not None:
            restored = self.recovery.restore(self.model, step)
            if restored:
                self.masks.clean()
            if self.recovery.best_step is not None and (restored or self.recovery.best_step == step):
                record.metric = numbers(self.recovery.metrics)
            else:
                record.metric = numbers(self.evaluate(ignore_keys=ignore_keys))
        record.seconds = time.perf_counter() - began
        self.log(step_logs(record))
        self.progress.close(phase.gradual, step, self.state.epoch)

    def _prune_to(self, target: float) -> float:
        achieved = self.method.prune_to(target)
        self.log({"phase": self.progress.phase + 1, **self.method.logs(target, achieved)})
        self.callback_handler.log_layers(self.args, self.state, self.control, self.method.layers)
        return achieved

    def prune_inside(self, target: float) -> None:
        """Gradual pruning: reaches the next target inside the running phase."""
        achieved = self._prune_to(target)
        progress, phase = self.progress, self.phases[self.progress.phase]
        progress.reached += 1
        progress.record.target, progress.record.achieved = target, achieved
        progress.records.append(StepRecord(phase.number, target, achieved))
        if self.recovery is not None and progress.reached == len(phase.gradual):
            # Weights of different sparsity don't compare: the best counts from the last target on.
            self.recovery.begin(phase.patience)

    def divergence(self, loss: float) -> str:
        where = f" in phase {self.progress.phase + 1} ({self.achieved:.1%} pruned)" if self.phases else ""
        return super().divergence(loss) + where

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def save_extra(self, folder: Path) -> None:
        if self.pruning is not None:
            if not self.progress.done:
                self.progress.record.seconds = time.perf_counter() - self._began
            save_state(self, folder, self.held)
