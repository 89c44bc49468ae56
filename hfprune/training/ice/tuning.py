"""The search for a strategy's settings: short runs on a sample, of which the quickest within a drop wins.

The trade-off: the fewer seconds a whole run would take on all of the data the better, as long as the metric ends no
more than `bound` below the dense model's. Where no trial keeps to that, the one that lost least wins. This objective is
the project's own.
"""

from __future__ import annotations

import importlib
import math
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from hfprune.errors import ConfigError
from hfprune.strategy import Ice, Tuning
from hfprune.training.ice.side import side_trainer
from hfprune.training.progress import tell
from hfprune.training.removal import of_the_first

if TYPE_CHECKING:
    from hfprune.training.trainer import PruningTrainer

LEAST_EVALUATED = 500
"""Rows of the evaluation data that a trial sees at least: fewer tell an accuracy to no point."""
# The grid that the method's authors draw from; triggers and rates are said relative to what the recipe says.
TRIGGERS, FREEZES, BASES, CENTRES, STEEPNESSES, FALLS = (
    (0.5, 1.0, 2.0),
    (0.2, 0.4, 0.6, 0.8),
    (1.0, 2.0, 5.0),
    (0.1, 0.15, 0.2),
    (40.0, 50.0, 60.0),
    (0.6, 0.7, 0.8),
)


@dataclass
class Trial:
    """One run on the sample.

    Attributes:
        settings: of the strategy, as plain values.
        seconds: what the run would take on all of the data: what pruning took, and the fine-tuning by its share of it.
        drop: how much worse than the dense model's the metric ended, on the sample.
        excess: by how much that is beyond the bound; at most 0 where it is within.
    """

    settings: dict[str, Any]
    seconds: float
    drop: float
    excess: float

    @property
    def order(self) -> tuple[bool, float]:
        """What the least of wins."""
        within = self.excess <= 0
        return not within, self.seconds if within else self.drop


@dataclass
class Found:
    """The settings that won, and all trials as plain values."""

    settings: Ice
    trials: list[dict[str, Any]]


class _Stopwatch(TrainerCallback):
    """The seconds of all optimizer steps together."""

    seconds = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds += time.perf_counter() - self.began


def check_optuna() -> None:
    """Refuses where the package is missing, before anything is trained."""
    try:
        importlib.import_module("optuna")
    except ImportError as error:
        raise ConfigError("pruning.strategy.tune: needs the package optuna: pip install 'hfprune[tune]'") from error


def search(kind: type[PruningTrainer], trainer: PruningTrainer) -> Found:
    """Runs the trials; the first one with the settings as they are written.

    Args:
        kind: the class of the trainers that run beside.
        trainer: before its first step; its model is not changed.
    """
    optuna = importlib.import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings: Ice = trainer.pruning.strategy
    tuning = settings.tune
    seed = tuning.seed if tuning.seed is not None else trainer.args.seed
    batch = trainer.args.train_batch_size * trainer.args.world_size
    train, share = sampled(trainer.train_dataset, tuning.sample, 2 * batch, seed)
    held, _ = sampled(trainer.eval_dataset, tuning.sample, LEAST_EVALUATED, seed)
    sampler = optuna.samplers.TPESampler(
        seed=seed,
        n_startup_trials=max(2, tuning.trials // 2),
        constraints_func=lambda trial: trial.user_attrs["excess"],
    )
    study = optuna.create_study(sampler=sampler)
    written = settings.model_copy(update={"tune": None})
    trials: list[Trial] = []
    for number in range(tuning.trials):
        asked = study.ask() if number else None
        wanted = of_the_first(written if asked is None else drawn(asked, written, tuning, trainer))
        trials.append(of_the_first(run_trial(kind, trainer, wanted, train, held, share, tuning)))
        tell(trainer, f"ice: trial {number + 1}/{tuning.trials}: {said(trials[-1], trainer)}")
        if asked is not None:
            asked.set_user_attr("excess", (trials[-1].excess,))
            study.tell(asked, trials[-1].seconds)
    best = min(trials, key=lambda trial: trial.order)
    if best.excess > 0:
        tell(trainer, f"ice: no trial stayed within {tuning.bound}; the one that lost least is taken")
    return Found(Ice.model_validate(best.settings), [asdict(trial) for trial in trials])


def drawn(asked: Any, written: Ice, tuning: Tuning, trainer: PruningTrainer) -> Ice:
    """Settings drawn from the grid, for the parts that are switched on."""
    found: dict[str, Any] = {}
    if written.trigger is not False:
        bound = tuning.bound
        factor = asked.suggest_categorical("trigger", TRIGGERS)
        scaled = {"points": max(0.1, bound.points * factor)} if bound.points else {"relative": bound.relative * factor}
        found["trigger"] = type(bound)(**scaled)
    if written.freeze:
        found["freeze"] = asked.suggest_categorical("freeze", FREEZES)
    if written.rate is not False:
        said_base = trainer.phases[0].learning_rate or trainer.args.learning_rate
        base = (written.rate.base or said_base) * asked.suggest_categorical("base", BASES)
        found["rate"] = type(written.rate)(
            base=base,
            delta=base * asked.suggest_categorical("delta", FALLS),
            p=asked.suggest_categorical("p", CENTRES),
            beta=asked.suggest_categorical("beta", STEEPNESSES),
        )
    return written.model_copy(update=found)


def run_trial(
    kind: type[PruningTrainer],
    trainer: PruningTrainer,
    settings: Ice,
    train: Any,
    held: Any,
    share: float,
    tuning: Tuning,
) -> Trial:
    """One run on the sample.

    Args:
        kind, trainer: as for `search`.
        settings: of the strategy.
        train, held: the sample.
        share: which part of the training data the sample is.
        tuning: whose bound counts.
    """
    watch = _Stopwatch()
    side = side_trainer(kind, trainer, settings, train, held, [watch])
    side.course.changes = trainer.course.changes  # one probe, on all of the data, serves all trials
    began = time.perf_counter()
    side.train()
    took = time.perf_counter() - began
    dense, watched = side.course.found["dense"], side.recovery
    drop = watched.behind(side.steps[-1].metric[watched.name], dense)
    seconds = took - watch.seconds + watch.seconds / share
    return Trial(settings.model_dump(mode="json"), seconds, drop, drop - tuning.bound.of(dense, watched.in_points))


def said(trial: Trial, trainer: PruningTrainer) -> str:
    """A trial for a person."""
    name, course = trainer.recovery.name, trainer.course
    kept = "within the bound" if trial.excess <= 0 else "beyond the bound"
    return f"{name} {course.difference(trial.drop)} on the sample, {kept}; the run would take {trial.seconds:.1f} s"


def sampled(rows: Any, fraction: float, least: int, seed: int) -> tuple[Any, float]:
    """Some rows of a data set, and which part of it they are.

    Args:
        rows: a data set with a length; of several by name each is sampled.
        fraction: of the rows.
        least: at least so many rows, where there are so many.
        seed: of the choice.
    """
    if isinstance(rows, dict):
        return {name: sampled(part, fraction, least, seed)[0] for name, part in rows.items()}, fraction
    if not hasattr(rows, "__len__"):
        raise ConfigError("pruning.strategy.tune: takes a sample of the data, and a stream has no length; leave it out")
    count = min(len(rows), max(math.ceil(fraction * len(rows)), least))
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    select = getattr(rows, "select", None)
    return select(chosen) if select else torch.utils.data.Subset(rows, chosen), count / max(1, len(rows))
