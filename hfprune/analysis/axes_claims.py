"""What the runs of several methods say of three claims on pruning language models (Emili et al., arXiv 2310.03424).

Criterion, method and schedule are its three axes. A comparison counts where it exceeds the seeds' spread
(`analysis.verdicts`); speed counts where it differs by more than 5 %, and by more than zeros, which are multiplied like
any other weight, seem to change it: that is how far the timing itself strays.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from hfprune.analysis.verdicts import CONFIRMED, UNDECIDED, Case, Claim, Group, Judge, Measure, spread
from hfprune.methods import LOW_RANK, UNSTRUCTURED

MAGNITUDE = ("l1", "l2", "lamp", "singular_value")
MODERATE = 0.5
"""Sizes from which on compression counts as moderate."""
SEVERAL = 3
"""Comparisons that make several."""
_SPEED = 1.05


@dataclass(frozen=True)
class AxesGroup(Group):
    """Runs of one method, criterion, schedule, size and length, which differ only in their seed.

    Attributes:
        method, kind: its name, and `unstructured`, `structured` or `low_rank`.
        size: the fraction of the dense model's parameters that was asked for.
        looks_at_data: whether the criterion runs batches through the model.
        nonzero: non-zero parameters that are left over the dense model's, a mean over the seeds.
        bytes: of the checkpoint on disk, a mean.
        latency_ms, speedup: batch size to milliseconds, and to how many times quicker than the dense model, medians.
    """

    method: str = ""
    kind: str = ""
    size: float = 1.0
    looks_at_data: bool = False
    nonzero: float | None = None
    bytes: float | None = None
    latency_ms: dict[str, float] = field(default_factory=dict)
    speedup: dict[str, float] = field(default_factory=dict)

    @property
    def place(self) -> tuple[Any, ...]:
        return self.size, self.length, self.method, self.criterion

    @property
    def where(self) -> str:
        return f"{self.size:.4g}"

    @property
    def speed(self) -> float:
        """The speed-up at the largest batch size; not a number where none was measured."""
        return self.speedup[max(self.speedup, key=int)] if self.speedup else math.nan

    def named(self, criterion: bool) -> str:
        return f"{self.method} {self.criterion} {self.schedule}" if criterion else f"{self.method} {self.schedule}"


def claims(measure: Measure, groups: Iterable[AxesGroup]) -> list[Claim]:
    """Its three claims, each confirmed, not confirmed or undecided by these runs.

    "In several scenarios" asks for three comparisons and more for than against. The second claim also asks for a larger
    mean gain at the smallest size than at the largest. For the third the best low-rank result of each size from a half
    on stands beside the best of every other method: better in one of metric and speed, and no worse in the other.

    Args:
        measure: the metric.
        groups: of all methods.
    """
    found = [group for group in groups if group.values]
    judged = Judge(measure, found)
    return [
        _data_driven(judged, found),
        _incremental(judged, found),
        judged.claim(3, "low-rank gives the best trade-off of size and speed at moderate compression",
                     _trade_offs(measure, found),
                     f"no low-rank beside another method at {MODERATE:g} of the parameters or more",
                     neither="for neither (one is better, the other faster; or alike)"),
    ]  # fmt: skip


def _data_driven(judged: Judge, groups: Sequence[AxesGroup]) -> Claim:
    """Every criterion that looks at data beside every one of magnitude, all else alike."""
    pairs = [
        (one, other)
        for one, other in product(groups, groups)
        if one.looks_at_data
        and other.criterion.split()[0] in MAGNITUDE
        and (one.method, one.size, one.length, one.schedule) == (other.method, other.size, other.length, other.schedule)
    ]
    cases = [judged.case(one, other, criteria=True) for one, other in pairs]
    missing = "no criterion of magnitude beside one that looks at data"
    text = "data-driven criteria beat magnitude in several scenarios"
    claim = judged.claim(1, text, cases, missing, enough=SEVERAL)
    return replace(claim, numbers=f"{_by_method(pairs, cases)}{claim.numbers}")


def _incremental(judged: Judge, groups: Sequence[AxesGroup]) -> Claim:
    """Every schedule of several steps beside one_shot, all else alike."""
    pairs = [
        (one, other)
        for one, other in product(groups, groups)
        if one.schedule != "one_shot" and other.schedule == "one_shot" and one.place == other.place
    ]
    cases = [judged.case(one, other, criteria=True) for one, other in pairs]
    text = "incremental pruning beats one-shot, most at small sizes"
    claim = judged.claim(2, text, cases, "no schedule of several steps beside one_shot")
    gains: dict[float, list[float]] = {}
    for one, other in pairs:
        gains.setdefault(one.size, []).append(judged.measure.gain(one.mean, other.mean) / abs(other.mean))
    means = {size: statistics.fmean(gains[size]) for size in sorted(gains)}
    if not means:
        return claim
    most = len(means) > 1 and means[min(means)] > means[max(means)]
    verdict = claim.verdict if most or claim.verdict != CONFIRMED else UNDECIDED
    told = ", ".join(f"{100 * gain:+.1f} % at {size:.4g}" for size, gain in means.items())
    numbers = f"mean gain over one-shot {told}; {_by_method(pairs, cases)}{claim.numbers}"
    return replace(claim, verdict=verdict, numbers=numbers)


def _by_method(pairs: Sequence[tuple[AxesGroup, AxesGroup]], cases: Sequence[Case]) -> str:
    """How many comparisons of each method speak for a claim and against it; empty for a single method."""
    found: dict[str, list[int]] = {}
    for (one, _), case in zip(pairs, cases, strict=True):
        found.setdefault(one.method, []).append(case.speaks)
    counts = [f"{name} {said.count(1)} for, {said.count(-1)} against of {len(said)}" for name, said in found.items()]
    return f"{'; '.join(counts)}; in all " if len(counts) > 1 else ""


def _trade_offs(measure: Measure, groups: Sequence[AxesGroup]) -> list[Case]:
    """The best low-rank result of every moderate size beside the best of every other method."""
    cases, margin = [], _margin(groups)
    for size in sorted({group.size for group in groups if group.size >= MODERATE}):
        best: dict[str, AxesGroup] = {}
        for group in (group for group in groups if group.size == size):
            if group.method not in best or measure.gain(group.mean, best[group.method].mean) > 0:
                best[group.method] = group
        ours = [group for group in best.values() if group.kind == LOW_RANK]
        others = [group for group in best.values() if group.kind != LOW_RANK]
        cases += [_trade_off(measure, one, other, margin) for one, other in product(ours, others)]
    return cases


def _margin(groups: Sequence[AxesGroup]) -> float:
    """The ratio of two speeds from which on they differ."""
    zeros = [group.speed for group in groups if group.kind == UNSTRUCTURED and not math.isnan(group.speed)]
    return max([_SPEED, *(max(speed, 1 / speed) for speed in zeros)])


def _trade_off(measure: Measure, one: AxesGroup, other: AxesGroup, margin: float) -> Case:
    gap, apart, faster = measure.gain(one.mean, other.mean), spread(one, other), one.speed / other.speed
    better = 0 if apart is None or abs(gap) <= apart else (1 if gap > 0 else -1)
    quicker = 1 if faster > margin else -1 if faster < 1 / margin else 0
    speaks = 0
    if apart is not None and better + quicker and better * quicker >= 0:
        speaks = 1 if better + quicker > 0 else -1
    around = "one seed" if apart is None else f"spread {measure.difference(apart)}"
    sides = [f"{g.named(True)} {measure.show(g.mean)}, {g.speed:.2f}x as fast as dense" for g in (one, other)]
    return Case(speaks, f"{one.where}: {sides[0]}, against {sides[1]} ({around})")
