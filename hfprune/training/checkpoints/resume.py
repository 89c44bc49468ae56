"""ResumableTrainer: a Trainer whose checkpoints are whole or not there and load back exactly."""

from __future__ import annotations

import copy
import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import TrainOutput

from hfprune.checkpoint.files import is_write_failure, write_text
from hfprune.checkpoint.load import from_pretrained
from hfprune.checkpoint.save import save_pretrained
from hfprune.errors import CheckpointError, TrainingDiverged
from hfprune.masks import MaskSet
from hfprune.stopping import deferred, handled
from hfprune.training.callbacks import StopCallback
from hfprune.training.checkpoints.folder import (
    SIDE,
    is_whole,
    last_checkpoint,
    last_whole,
    move_into_place,
    retain,
    set_right,
)
from hfprune.training.loss import LossTrainer

ARGUMENTS_FILE = "training_args.json"
PROCESSES_FILE = "training_processes.json"


class ResumableTrainer(LossTrainer):
    """Trainer with safe checkpoints; everything else is Trainer's own."""

    masks: MaskSet | None = None
    _side: str | None = None
    _push_later: str | None = None

    def __init__(
        self, model: nn.Module | None = None, args: TrainingArguments | None = None, *others: Any, **more: Any
    ):
        # Trainer's own answer to SIGTERM would go on with the next phase.
        self.on_demand = args is not None and args.enable_jit_checkpoint
        if self.on_demand:
            args = copy.copy(args)
            args.enable_jit_checkpoint = False
        super().__init__(model, args, *others, **more)
        self.add_callback(StopCallback())

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As in Trainer. Where a command runs, or `enable_jit_checkpoint` asks for it, SIGTERM leaves a checkpoint."""
        if isinstance(resume_from_checkpoint, str):
            self._check_step(Path(resume_from_checkpoint))
        stops = any(isinstance(callback, StopCallback) for callback in self.callback_handler.callbacks)
        with handled() if self.on_demand else nullcontext(), deferred() if stops else nullcontext():
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _examples(self) -> int:
        """Examples that an optimizer step sees, over all processes."""
        args = self.args
        return args.per_device_train_batch_size * max(1, args.world_size) * args.gradient_accumulation_steps

    def _check_step(self, checkpoint: Path) -> None:
        """Refuses to go on in the middle of training with steps of another size: the place in the data would be wrong.

        Any number of processes will do that gives the same examples a step.
        """
        try:
            before = json.loads((checkpoint / PROCESSES_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        now, processes = self._examples(), max(1, self.args.world_size)
        if before["examples_per_step"] == now:
            return
        size, rest = divmod(before["examples_per_step"], processes * self.args.gradient_accumulation_steps)
        instead = f"training.per_device_train_batch_size={size} or " if not rest else ""
        raise CheckpointError(
            f"'{checkpoint}' was made by {before['processes']} processes with {before['examples_per_step']} examples "
            f"an optimizer step; {processes} with {now} would go on at another place of the data: resume with "
            f"{instead}the same number of processes"
        )

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss).all():
            raise TrainingDiverged(self.divergence(float(loss)))
        return loss

    def divergence(self, loss: float) -> str:
        """What to say of a loss that is not finite, before it reaches any weight."""
        rate = self._get_learning_rate()
        return (
            f"training.learning_rate: the loss became {loss} at optimizer step {self.state.global_step + 1} with a "
            f"learning rate of {rate:.2g} (set: {self.args.learning_rate:g}); try {self.args.learning_rate / 10:g}"
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        options = {"state_dict": state_dict} if state_dict is not None else {}
        self.write_model(output_dir or self.args.output_dir, model, self.masks, **options)

    def write_model(self, folder: str, model: nn.Module, masks: MaskSet | None, **options: Any) -> None:
        """Writes a model, with what belongs to a model of this trainer, into a folder."""
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        save_pretrained(model, folder, masks or None, tokenizer, **options)
        # Trainer pickles its arguments; JSON says the same and runs nothing when it is read.
        write_text(Path(folder) / ARGUMENTS_FILE, self.args.to_json_string() + "\n")

    def _get_output_dir(self, trial: Any) -> str:
        return self._side or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes the checkpoint beside its place and moves it there whole."""
        folder = super()._get_output_dir(trial)
        name = f"checkpoint-{self.state.global_step}"
        self._side = os.path.join(folder, f"{SIDE}{name}")
        # Trainer would look for its best checkpoint beside the unfinished one.
        best_step, self.state.best_global_step = self.state.best_global_step, None
        try:
            if self.args.should_save:
                shutil.rmtree(self._side, ignore_errors=True)
            super()._save_checkpoint(model, trial)
            if best_step:
                self._record_best(Path(folder), Path(self._side) / name, best_step)
            if self.args.should_save:
                world = {"processes": max(1, self.args.world_size), "examples_per_step": self._examples()}
                write_text(Path(self._side) / name / PROCESSES_FILE, json.dumps(world) + "\n")
                self.save_extra(Path(self._side) / name)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if not is_whole(Path(self._side) / name):
                    raise CheckpointError("what was written can't be read back")
                move_into_place(Path(self._side) / name, Path(folder) / name)
                retain(Path(folder), self.args.save_total_limit, name, self.state.best_model_checkpoint)
        except (OSError, RuntimeError, SafetensorError) as error:
            if _is_about_writing(error):
                if self.args.should_save:
                    set_right(Path(folder))
                raise CheckpointError(_not_written(folder, name, error)) from error
            raise
        finally:
            if self.args.should_save:
                shutil.rmtree(self._side, ignore_errors=True)
            self._side, self.state.best_global_step = None, best_step
        if self._push_later:
            self._push_later = None
            self.push_checkpoint(os.path.join(folder, name))

    def _record_best(self, folder: Path, side: Path, best_step: int) -> None:
        """Says where the best checkpoint will lie, in the state and in the checkpoint being written."""
        best = folder / f"checkpoint-{best_step}"
        if best_step != self.state.global_step and not best.is_dir():
            return
        self.state.best_model_checkpoint, self.state.best_global_step = str(best), best_step
        if self.args.should_save:
            self.state.save_to_json(str(side / "trainer_state.json"))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer pushes before the checkpoint is in its place.
        self._push_later = checkpoint_folder

    def push_checkpoint(self, folder: str) -> None:
        """What a subclass pushes once a checkpoint lies in its place."""

    def find_checkpoint(self, resume: str | bool | None) -> str | None:
        """The folder to resume from; None to begin anew.

        Raises:
            CheckpointError: True was said, and there is none.
        """
        if resume is True:
            found = last_checkpoint(self.args.output_dir)
            if found is None:
                raise CheckpointError(f"no whole checkpoint to resume from in '{self.args.output_dir}'")
            return str(found)
        return resume or None

    def save_without_optimizer(self, trial: Any) -> None:
        """A checkpoint between two trainings, which needs no optimizer."""
        only_model, self.args.save_only_model = self.args.save_only_model, True
        try:
            self._save_checkpoint(self.model, trial)
        finally:
            self.args.save_only_model = only_model

    def save_extra(self, folder: Path) -> None:
        """What a subclass adds to a checkpoint before it is moved into place."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Loads through `from_pretrained`: reading the tensors straight into the model would miss those that
        transformers renames while saving, and say so only in a warning."""
        target = self.accelerator.unwrap_model(model if model is not None else self.model)
        if not isinstance(target, PreTrainedModel):
            if not hasattr(target, "peft_config"):
                from_pretrained(resume_from_checkpoint, target, check=False)
                return
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        fresh = type(target).from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        target.load_state_dict(fresh.state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _is_about_writing(error: Exception) -> bool:
    """Whether a file could not be written; torch.save says so in a RuntimeError."""
    return is_write_failure(error) or isinstance(error, CheckpointError) or "StreamWriter" in str(error)


def _not_written(folder: str, name: str, error: Exception) -> str:
    # One process alone may have failed to write: the others are not waited for.
    last = last_whole(Path(folder))
    kept = f"the last good one is '{last}'" if last else "there is none before it"
    return f"output.folder: {name} could not be written ({' '.join(str(error).split())}); {kept}"
