"""Progress of long work: a bar in a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback

if TYPE_CHECKING:
    from hfprune.training.trainer import PruningTrainer

HEARTBEAT = 30.0
"""Seconds after which a log without a terminal gets a line even when nothing was evaluated."""


class PhaseProgress(TrainerCallback):
    """Shows phase, target, metric and the time left."""

    def __init__(self, trainer: PruningTrainer, bars: bool = True):
        self.trainer = trainer
        self.console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self.bars = bars and self.console.is_terminal
        self.bar: Progress | None = None
        self.loss: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began, self.first = time.monotonic(), state.global_step
        self.said = self.began
        self.metric = ""
        if not state.is_world_process_zero:
            return
        if self.bars:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[metric]}"),
                TextColumn("{task.fields[left]}"),
                console=self.console,
            )
            self.bar.start()
            self.task = self.bar.add_task(self._title(), total=state.max_steps - self._offset(), metric="", left="")
        else:
            self.say(self._title() + f", up to {state.max_steps - self._offset()} optimizer steps")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        if self.bar is not None:
            done = state.global_step - self._offset()
            left = self._left(state)
            self.bar.update(
                self.task, completed=done, description=self._title(), metric=self.metric, left=f"{left} left"
            )
        elif time.monotonic() - self.said > HEARTBEAT:
            self._line(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and isinstance(logs.get("loss"), float):
            self.loss = logs["loss"]

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, Any], **_: Any) -> None:
        if not state.is_world_process_zero or not self.trainer.is_in_train:
            return
        name, value = self._watched(metrics)
        best = self.trainer.recovery.best if self.trainer.recovery is not None else None
        self.metric = "" if value is None else f"{name} {shown(name, value)}"
        if best is not None and self.metric:
            self.metric += f" (best {shown(name, best)})"
        if self.bar is None:
            self._line(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def close(self) -> None:
        """Gives the terminal back after an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _line(self, state: Any) -> None:
        epoch = (state.epoch or 0.0) - self.trainer.progress.epoch_offset
        parts = [self._title(), f"epoch {epoch:.1f}"]
        if self.loss is not None:
            parts.append(f"training loss {self.loss:.4g}")
        if self.metric:
            parts.append(self.metric)
        parts.append(f"{self._left(state)} left at most")
        self.say("  ".join(parts))

    def say(self, text: str) -> None:
        """A line for the person who waits."""
        self.said = time.monotonic()
        self.console.print(text, markup=False)

    def _offset(self) -> int:
        return self.trainer.progress.step_offset

    def _title(self) -> str:
        phases = self.trainer.phases
        if not phases:
            return "dense training"
        number = self.trainer.progress.phase + 1
        return f"phase {number}/{len(phases)}: {self.trainer.method.words(self.trainer.achieved)}"

    def _left(self, state: Any) -> str:
        """The time that the rest takes at this speed, if no phase ends early."""
        done = state.global_step - self.first
        if not done:
            return "?"
        per_step = (time.monotonic() - self.began) / done
        steps = state.max_steps - state.global_step
        later = self.trainer.phases[self.trainer.progress.phase + 1 :]
        length = state.max_steps - self._offset()
        here = self.trainer.phases[self.trainer.progress.phase] if self.trainer.phases else None
        for phase in later:
            same_unit = phase.epochs and here is not None and here.epochs
            steps += phase.steps or (round(length * phase.epochs / here.epochs) if same_unit else length)
        seconds = round(per_step * steps)
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def _watched(self, metrics: dict[str, Any]) -> tuple[str, float | None]:
        monitor = self.trainer.recovery.monitor if self.trainer.recovery is not None else None
        names = [monitor, f"eval_{self.trainer.args.metric_for_best_model}", "eval_accuracy", "eval_loss"]
        for name in names:
            if isinstance(metrics.get(name), int | float):
                return name.removeprefix("eval_"), float(metrics[name])
        return "", None


def shown(name: str, value: float) -> str:
    """A metric's value for a person."""
    fraction = 0 <= value <= 1 and not any(part in name for part in ("loss", "perplexity"))
    return f"{value:.1%}" if fraction else f"{value:.4g}"


def tell(trainer: PruningTrainer, text: str) -> None:
    """Says a line where the trainer shows its progress, once for all processes."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, PhaseProgress) and trainer.is_world_process_zero():
            callback.say(text)
