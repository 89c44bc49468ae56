"""Strategy: what a run does beyond its schedule; `ice` prunes block by block and fine-tunes only where it must.

Source: ICE-Pruning (Hu, Henderson, Cano, arXiv 2505.07411). The search for its settings is this project's own.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from hfprune.drop import Drop, points
from hfprune.strict import Ratio, StrictModel

Positive = Annotated[float, Field(gt=0)]


class Rate(StrictModel):
    """The pruning-aware learning rate: high while much is left, low once a fraction `p` and more is gone.

    Attributes:
        base: what it starts from; by default the phase's own learning rate.
        delta: how far it falls; by default 0.7 of `base`.
        p: the fraction of the weights that is gone where half of the fall has happened.
        beta: how steep the fall is.
    """

    base: Positive | None = None
    delta: Annotated[float, Field(ge=0)] | None = None
    p: Annotated[float, Field(gt=0, lt=1)] = 0.15
    beta: Positive = 50.0

    @model_validator(mode="after")
    def _positive(self) -> Rate:
        if self.base is not None and self.delta is not None and self.delta >= self.base:
            raise ValueError(f"delta: {self.delta:g} would leave no learning rate of the base {self.base:g}")
        return self

    def at(self, remaining: float, default: float) -> float:
        """The learning rate of a phase.

        Args:
            remaining: the fraction of the model's weights that is left.
            default: the base where none is said.
        """
        base = default if self.base is None else self.base
        delta = 0.7 * base if self.delta is None else min(self.delta, 0.999 * base)
        return pruning_aware_rate(remaining, base, delta, self.p, self.beta)


def pruning_aware_rate(remaining: float, base: float, delta: float, p: float, beta: float) -> float:
    """`base - delta / (1 + (x / (2 (1 - p) - x)) ** beta)` for the remaining fraction x (ICE-Pruning).

    From x = 2 (1 - p) on, where that has no value, it is its limit, `base`.

    Args:
        remaining: x, the fraction of the weights that is left.
        base, delta: of the learning rate: where it starts, and how far it falls.
        p: the fraction gone at which half of the fall has happened.
        beta: the steepness.
    """
    rest = 2 * (1 - p) - remaining
    if rest <= 0:
        return base
    if remaining <= 0:
        return base - delta
    power = beta * math.log(remaining / rest)
    return base - delta / (1 + math.exp(power)) if power < 700 else base


class Tuning(StrictModel):
    """A search for the strategy's settings on a sample of the data: the shortest run that stays within a drop.

    Which settings are tried follows from the seed; which of them win depends on the time that they take, so that it may
    differ from one machine to another.

    Attributes:
        bound: the drop of the monitored metric that a run may end with.
        trials: runs on the sample; the first one is made with the settings as they are written.
        sample: the fraction of the training data, and of the evaluation data (of which at least 500 rows count).
        seed: of the sample and the search; by default the training's.
    """

    bound: Annotated[Drop, BeforeValidator(lambda value: points(value))] = Field(
        default_factory=lambda: Drop(points=1.0)
    )
    trials: Annotated[int, Field(ge=1, le=1000)] = 5
    sample: Annotated[float, Field(gt=0, le=1)] = 0.02
    seed: int | None = None


class Ice(StrictModel):
    """ICE-Pruning: one block a step, fine-tuned only where the metric has fallen too far. `false` switches a part off.

    Attributes:
        kind: `ice`.
        trigger: a step is fine-tuned when the monitored metric has fallen so far behind the dense model's; `false`
            fine-tunes after every step.
        freeze: the fraction of the layers that is never fine-tuned: those whose weights a probe changed least, an epoch
            of fine-tuning after pruning the first block of a copy.
        rate: the pruning-aware learning rate; `false` keeps that of the phase.
        tune: search for these three first; needs the package optuna.
    """

    kind: Literal["ice"] = "ice"
    trigger: Annotated[Drop | Literal[False], BeforeValidator(lambda value: points(value))] = Field(
        default_factory=lambda: Drop(points=1.5)
    )
    freeze: Annotated[Ratio | Literal[False], BeforeValidator(lambda value: 0.5 if value is True else value)] = 0.5
    rate: Annotated[Rate | Literal[False], BeforeValidator(lambda value: {} if value is True else value)] = Field(
        default_factory=Rate
    )
    tune: Annotated[Tuning | None, BeforeValidator(lambda value: _switch(value))] = None


def _switch(value: Any) -> Any:
    return {True: {}, False: None}[value] if isinstance(value, bool) else value
