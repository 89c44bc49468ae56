"""Pruning schedules: cumulative targets over steps.

Increments are fractions of the ORIGINAL number of units. Sources: one-shot, constant, geometric and hybrid after
"One Shot vs. Iterative" (Janusz et al., arXiv 2508.13836), with the geometric rule that really reaches its target;
cubic after "To prune, or not to prune" (Zhu & Gupta 2017, arXiv 1710.01878).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from hfprune.errors import ConfigError
from hfprune.registry import Registry

AUTO = "auto"
"""Stands for the schedule that `advise` names, once the model is known."""
LARGE_RATIO = 0.8
LONG_PHASE = 10.0
"""Epochs that the first phase may take from which on a hybrid schedule is advised. Our own number: the source only says
that its first phase is long (a patience of 200 epochs)."""

schedules: Registry[Callable[[float, int], list[float]]] = Registry("schedule")


@schedules.register("one_shot")
def one_shot(ratio: float, steps: int) -> list[float]:
    """Everything at once."""
    return [ratio]


@schedules.register("constant")
def constant(ratio: float, steps: int) -> list[float]:
    """The same fraction of the original units in every step."""
    return [ratio / steps] * steps


@schedules.register("geometric")
def geometric(ratio: float, steps: int) -> list[float]:
    """The same fraction of the REMAINING units in every step: kept after t steps is `(1 - ratio) ** (t / steps)`."""
    rate = geometric_rate(ratio, steps)
    return [rate * (1 - rate) ** t for t in range(steps)]


@schedules.register("cubic")
def cubic(ratio: float, steps: int) -> list[float]:
    """Fast first, slow at the end: `ratio * (1 - (1 - t / steps) ** 3)` after t steps."""
    reached = [ratio * (1 - (1 - t / steps) ** 3) for t in range(steps + 1)]
    return [after - before for before, after in zip(reached, reached[1:], strict=False)]


@schedules.register("hybrid")
def hybrid(ratio: float, steps: int, first: float | None = None) -> list[float]:
    """`first` in one go (by default three quarters of the ratio), then `steps` geometric steps: `steps + 1` in all."""
    first = 0.75 * ratio if first is None else first
    if not 0 < first < ratio:
        raise ConfigError(f"first: {first} must lie between 0 and the ratio {ratio}, e.g. {round(0.75 * ratio, 4)}")
    return [first, *geometric(ratio - first, steps)]


def geometric_rate(ratio: float, steps: int) -> float:
    """The fraction of the remaining units that goes in each of `steps` geometric steps to reach `ratio`."""
    return 1 - (1 - ratio) ** (1 / steps)


def increments(kind: str, ratio: float, steps: int = 1, *, first: float | None = None) -> list[float]:
    """What each step removes, as fractions of the original units.

    Args:
        kind: a registered schedule: `one_shot`, `constant`, `geometric`, `cubic`, `hybrid`.
        ratio: the final fraction removed, in [0, 1).
        steps: the number of steps, at least 1; `hybrid` makes one more.
        first: what `hybrid` removes in its first step; only for `hybrid`.

    Returns:
        One fraction a step; their sum is `ratio`.

    Raises:
        ConfigError: an unknown kind, a ratio outside [0, 1), fewer steps than 1, a `first` that does not fit.
    """
    rule = schedules[kind]
    if not 0 <= ratio < 1:
        raise ConfigError(f"ratio: {ratio} must lie in [0, 1), e.g. 0.5")
    if steps < 1:
        raise ConfigError(f"steps: {steps} must be at least 1")
    if first is not None and kind != "hybrid":
        raise ConfigError(f"first: only the hybrid schedule has a first step of its own, not '{kind}'")
    return hybrid(ratio, steps, first) if kind == "hybrid" else rule(ratio, steps)


def targets(kind: str, ratio: float, steps: int = 1, *, first: float | None = None) -> list[float]:
    """The fraction removed in all after each step; the last is exactly `ratio`.

    Example:
        >>> [round(t, 8) for t in targets("hybrid", .92, 3, first=.8)]
        [0.8, 0.84171603, 0.88169183, 0.92]
    """
    reached, total = [], 0.0
    for step in increments(kind, ratio, steps, first=first):
        total += step
        reached.append(total)
    return [*reached[:-1], ratio]


def steps_for(ratio: float, largest_step: float, *, first: float = 0.0) -> int:
    """The number of geometric steps whose rate is the largest that stays within `largest_step`.

    It is the smallest n for which n geometric steps at the rate `largest_step` remove `ratio - first` or more.

    Args:
        ratio: the final fraction removed.
        largest_step: the wanted fraction of the remaining units a step, in (0, 1).
        first: what a hybrid schedule has removed before.

    Raises:
        ConfigError: a ratio outside [0, 1), a `first` outside [0, ratio], a `largest_step` outside (0, 1).
    """
    if not 0 <= ratio < 1:
        raise ConfigError(f"ratio: {ratio} must lie in [0, 1), e.g. 0.5")
    if not 0 <= first <= ratio:
        raise ConfigError(f"first: {first} must lie between 0 and the ratio {ratio}, e.g. {round(0.75 * ratio, 4)}")
    if not 0 < largest_step < 1:
        raise ConfigError(f"largest_step: {largest_step} must lie between 0 and 1, e.g. 0.1")
    steps = max(1, math.floor(math.log1p(first - ratio) / math.log1p(-largest_step)))
    while geometric_rate(ratio - first, steps) > largest_step + 1e-12:
        steps += 1
    return steps


def advise(family: str, ratio: float, phase: float, *, removal: bool = False) -> tuple[str, str]:
    """The schedule that the findings of "One Shot vs. Iterative" speak for, and why.

    Args:
        family: `convolutional`, `transformer`, `language` (a transformer over words) or `other`.
        ratio: the fraction that goes in the end.
        phase: how long the first phase may fine-tune, in epochs.
        removal: whether units are removed, rather than weights held at zero.

    Returns:
        The schedule's kind, and the reason as the end of a sentence.
    """
    if family == "convolutional" and ratio < LARGE_RATIO and not removal:
        return "one_shot", f"below {LARGE_RATIO:.0%} one step was found best for convolutional networks"
    if family == "language":
        return "geometric", "language models were found to lose much in a single large step already at small ratios"
    if family == "convolutional" and ratio >= LARGE_RATIO:
        found = f"at {LARGE_RATIO:.0%} and above small steps were found better than one for convolutional networks"
    elif removal:
        found = "where units are removed, small steps were found better than one"
    elif family == "transformer":
        found = "for transformers small steps were found better than one"
    else:
        found = "nothing was found for such a model, and small steps risk less"
    if phase >= LONG_PHASE:
        return "hybrid", f"{found}, and a first phase of {phase:g} epochs is long enough for the hybrid's large step"
    short = f"a first phase of {phase:g} epochs is too short (below {LONG_PHASE:g}) for the hybrid's large step"
    return "geometric", f"{found}, and {short}"
