"""Phases: what a training run does, one after another, and what is remembered of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hfprune.config import PruningConfig


@dataclass(frozen=True)
class Phase:
    """One selection and the fine-tuning after it.

    Attributes:
        number: counted from 1.
        target: the fraction gone in this phase, of what the target measures.
        epochs, steps: how long it fine-tunes at most; None stands for what TrainingArguments say.
        patience: evaluations without improvement after which it ends; None for no such end.
        learning_rate: None stands for TrainingArguments'.
        gradual: the targets reached one after another inside the phase; empty when the target is reached before it.
        every: optimizer steps between these.
        block: the residual block that a strategy prunes in it.
    """

    number: int
    target: float
    epochs: float | None = None
    steps: int | None = None
    patience: int | None = None
    learning_rate: float | None = None
    gradual: tuple[float, ...] = ()
    every: int = 0
    block: str = ""


def phases_of(config: PruningConfig, targets: list[float], blocks: Sequence[str] = ()) -> list[Phase]:
    """The phases that a configuration asks for, with their cumulative targets and, for a strategy, their blocks."""
    recovery = config.recovery
    short = config.strategy is not None and recovery.epochs is None and recovery.steps is None

    def phase(index: int, target: float, **more: Any) -> Phase:
        return Phase(
            number=index + 1,
            target=target,
            epochs=1.0 if short else recovery.value("epochs", index),
            steps=recovery.value("steps", index),
            patience=recovery.value("patience", index),
            learning_rate=recovery.value("learning_rate", index),
            block=blocks[index] if blocks else "",
            **more,
        )

    if config.schedule.every is not None:
        return [phase(0, targets[-1], gradual=tuple(targets), every=config.schedule.every)]
    return [phase(index, target) for index, target in enumerate(targets)]


@dataclass
class StepRecord:
    """What one pruning step did, as it stands in the report.

    Attributes:
        phase: the phase it belongs to, counted from 1.
        target: the fraction that was to go, and `achieved` the fraction gone.
        metric_before: evaluated right after pruning; None when nothing was evaluated.
        metric: evaluated at the phase's end, on the weights it leaves.
        epochs, seconds: what the phase took, scoring included.
        measured: what target and achieved are fractions of: `ratio` (units), `params`, `macs` or `latency`.
        units_gone, params, macs: removals only: the units gone so far, and what is left of the model.
        note: where the target was not met: what stood in the way.
        block: of a strategy: the residual block that was pruned.
        fine_tuned: whether the step was followed by fine-tuning; None where nothing decided on that.
        drop: of a strategy: how much worse than the dense model's the monitored metric was right after pruning.
        learning_rate, frozen: of a strategy: the fine-tuning's learning rate, and how many layers it left alone.
    """

    phase: int
    target: float
    achieved: float
    metric_before: dict[str, float] | None = None
    metric: dict[str, float] | None = None
    epochs: float = 0.0
    seconds: float = 0.0
    measured: str = "ratio"
    units_gone: int | None = None
    params: int | None = None
    macs: int | None = None
    note: str = ""
    block: str = ""
    fine_tuned: bool | None = None
    drop: float | None = None
    learning_rate: float | None = None
    frozen: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass
class PruningState:
    """Where a run stands: with the masks and the trainer's own state, enough to go on.

    Attributes:
        phase: the index of the current phase, counted from 0.
        done: whether that phase has ended, its best weights restored.
        step_offset, epoch_offset: optimizer steps and epochs of the phases before.
        record: of the current step.
        records: of the steps that have ended, the current one included once it has.
        reached: gradual pruning only: how many of its targets are reached.
        best: the recovery's state (`Recovery.state`).
        seconds: of training so far.
        teacher: a hash of the model that teaches, where one does.
        strategy: what the strategy found out before the first step.
        scored: batches seen for scores so far.
        dense: the monitored metric before the first step, where a drop is watched.
        targets: the schedule as it was changed on the way; empty for that of the configuration.
        collapses: the steps after which the metric had fallen too far, as in `StepRecord`, with what followed.
        ended: whether the schedule ended with the current step, before its last target.
    """

    phase: int = 0
    done: bool = False
    step_offset: int = 0
    epoch_offset: float = 0.0
    record: StepRecord | None = None
    records: list[StepRecord] = field(default_factory=list)
    reached: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    teacher: str = ""
    strategy: dict[str, Any] = field(default_factory=dict)
    scored: int = 0
    dense: float | None = None
    targets: list[float] = field(default_factory=list)
    collapses: list[dict[str, Any]] = field(default_factory=list)
    ended: bool = False

    def close(self, gradual: bool, step: int, epoch: float | None) -> None:
        """Ends the current phase.

        Args:
            gradual: whether it pruned inside: its steps are among the records already.
            step, epoch: how far training is, all phases counted.
        """
        record = self.record
        record.epochs = round((epoch or 0.0) - self.epoch_offset, 4)
        if not gradual:
            self.records.append(record)
        elif self.records:
            last = self.records[-1]
            last.metric, last.epochs, last.seconds = record.metric, record.epochs, record.seconds
        self.seconds += record.seconds
        self.step_offset, self.epoch_offset, self.done = step, epoch or self.epoch_offset, True

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PruningState:
        """The inverse of `to_dict`."""
        record = values["record"]
        return cls(
            **values
            | {
                "record": StepRecord(**record) if record else None,
                "records": [StepRecord(**entry) for entry in values["records"]],
            }
        )


def numbers(metrics: dict[str, Any] | None) -> dict[str, float] | None:
    """The metrics proper, without what an evaluation says of its own speed."""
    if metrics is None:
        return None
    plain = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
    timing = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    return {name: float(v) for name, v in plain.items() if isinstance(v, int | float) and not name.endswith(timing)}
