"""What happens inside a phase: masks enforced, movement added up, gradual pruning, whole-run counting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from hfprune.errors import Terminated
from hfprune.sharding import local
from hfprune.stopping import requested
from hfprune.training.optimizer import check_live

if TYPE_CHECKING:
    from hfprune.training.trainer import PruningTrainer


class MaskCallback(TrainerCallback):
    """Holds masked weights at zero right after every optimizer step, whatever the optimizer did."""

    def __init__(self, trainer: PruningTrainer):
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        # An optimizer that keeps weights of its own, as DeepSpeed's does, may have written them into the model.
        self.trainer.masks.enforce()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.trainer.masks.enforce()


class MovementCallback(TrainerCallback):
    """Adds up weight times gradient over the optimizer steps, for the criterion `movement`."""

    def __init__(self, trainer: PruningTrainer):
        self.trainer = trainer

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, *_: Any, **__: Any) -> None:
        trainer = self.trainer
        scaler = getattr(trainer.accelerator, "scaler", None)
        # Clipping has unscaled the gradients of fp16 training already.
        scale = scaler.get_scale() if scaler is not None and not args.max_grad_norm else 1.0
        for name, weight in trainer.method.weights.items():
            if weight.parameter.grad is not None:
                product = local(weight.parameter).float() * local(weight.parameter.grad).float() / scale
                trainer.history[name] = trainer.history[name] + product if name in trainer.history else product


class LiveParametersCallback(TrainerCallback):
    """Makes sure, at the begin of every phase, that what is trained is what the model is made of."""

    def __init__(self, own_optimizer: bool, copies: bool):
        self.own_optimizer, self.copies = own_optimizer, copies

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any) -> None:
        if self.copies:  # DeepSpeed's optimizer holds copies of the parameters
            return
        check_live(model, optimizer, all_of_them=not self.own_optimizer)


class GradualCallback(TrainerCallback):
    """Prunes inside a phase: the i-th target after `i * every` optimizer steps."""

    def __init__(self, trainer: PruningTrainer):
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        phase = trainer.phases[trainer.progress.phase]
        reached = trainer.progress.reached
        if reached >= len(phase.gradual):
            return
        if state.global_step - trainer.progress.step_offset >= (reached + 1) * phase.every:
            trainer.prune_inside(phase.gradual[reached])


class StopCallback(TrainerCallback):
    """Answers SIGTERM with a checkpoint after the running optimizer step, then ends the process.

    Several processes stop after the same step: one that has the signal names the next but one, which no other can have
    finished by then, since each step waits for the gradients of all.
    """

    KEY = "hfprune/stop"
    stops = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.world_size == 1:
            stops = requested()
        else:
            store = torch.distributed.distributed_c10d._get_default_store()
            if requested():
                store.compare_set(self.KEY, "", str(state.global_step + 2))
            stops = store.check([self.KEY]) and state.global_step >= int(store.get(self.KEY))
        self.stops = stops
        control.should_save = control.should_save or stops

    def on_save(self, *_: Any, **__: Any) -> None:
        if self.stops:
            raise Terminated


class SaveAfterEpochEnd(TrainerCallback):
    """Moves a checkpoint that falls on an epoch's last step behind the epoch's end: Trainer resumes after it, and what
    the epoch's end does (evaluating, counting patience) would otherwise be lost."""

    def __init__(self, trainer: PruningTrainer):
        self.trainer = trainer
        self.waiting = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        done = state.global_step - self.trainer.progress.step_offset
        self.waiting = control.should_save and done % self.trainer.updates_per_epoch == 0
        control.should_save = control.should_save and not self.waiting

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = control.should_save or self.waiting
        self.waiting = False


class CountingCallback(TrainerCallback):
    """Makes epochs count through the whole run, as optimizer steps do, where Trainer counts each phase from 0."""

    def __init__(self, trainer: PruningTrainer):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.epoch += self.trainer.progress.epoch_offset
