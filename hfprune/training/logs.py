"""What a run tells TensorBoard, W&B, MLflow and the others that `report_to` names: one run, whatever its phases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import WandbCallback
from transformers.trainer_callback import CallbackHandler

from hfprune.training.phases import StepRecord


class RunCallbacks(CallbackHandler):
    """A trainer's callbacks, of which its loggers see one training where every phase is one of Trainer's.

    Otherwise each phase would end their run, and the next one's numbers go to another or nowhere.
    """

    in_run = False

    @classmethod
    def of(cls, handler: CallbackHandler) -> RunCallbacks:
        """The callbacks that another handler has."""
        made = cls.__new__(cls)
        vars(made).update(vars(handler))
        return made

    def call_event(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if not (self.in_run and event in ("on_train_begin", "on_train_end")):
            return super().call_event(event, args, state, control, **kwargs)
        return self._only(False, event, args, state, control, **kwargs)

    def begin_run(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Tells the loggers that training begins."""
        self.in_run = True
        self._only(True, "on_train_begin", args, state, control)

    def end_run(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Tells the loggers that training has ended."""
        self._only(True, "on_train_end", args, state, control)
        self.in_run = False

    def log_layers(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        values: Callable[[], dict[str, float]],
    ) -> None:
        """Hands the loggers numbers of every layer, which the history in the checkpoints has no room for."""
        if any(map(_is_logger, self.callbacks)):
            self._only(True, "on_log", args, state, control, logs=values())

    def _only(self, loggers: bool, event: str, *given: Any, **kwargs: Any) -> TrainerControl:
        everyone = self.callbacks
        self.callbacks = [callback for callback in everyone if _is_logger(callback) == loggers]
        try:
            return super().call_event(event, *given, **kwargs)
        finally:
            self.callbacks = everyone


def step_logs(record: StepRecord) -> dict[str, float]:
    """The metrics of a step right after pruning and at its end."""
    before = {f"{name}_before": value for name, value in (record.metric_before or {}).items()}
    return before | {f"{name}_after": value for name, value in (record.metric or {}).items()}


def part_runs(handler: CallbackHandler) -> None:
    """Ends what a training began with a logger that goes on by itself: the next training is another run."""
    for callback in handler.callbacks:
        if isinstance(callback, WandbCallback) and callback._initialized and callback._wandb.run is not None:
            callback._wandb.finish()


def _is_logger(callback: TrainerCallback) -> bool:
    return any(kind.__module__.startswith("transformers.integrations") for kind in type(callback).__mro__)
