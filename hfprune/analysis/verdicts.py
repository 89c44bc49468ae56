"""Verdicts: which strategy won at a ratio, and what the runs say of the source's claims. Pure functions of numbers.

The spread of a difference between two strategies is `sqrt(sd_a ** 2 + sd_b ** 2)`, the standard deviations over seeds
(n - 1): how far two single runs with other seeds lie apart. A difference within it decides nothing. Three seeds make no
significance test; this is a plain rule, told with its numbers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from hfprune.report.tables import UNKNOWN, percent, title

CONFIRMED, REFUTED, UNDECIDED = "confirmed", "not confirmed", "undecided"
ITERATIVE = ("constant", "geometric")
_GRADIENTS = ("taylor", "snip", "fisher", "obd")
_NORMS = ("l1", "l2")
_MOST_NUMBERS = 12


@dataclass(frozen=True)
class Measure:
    """The metric that strategies are compared by.

    Attributes:
        name: as the recipe names it.
        greater_is_better: whether it is to grow.
        dense: the dense model's value.
        share: whether it is shown in percent, and its differences in points.
    """

    name: str
    greater_is_better: bool
    dense: float
    share: bool

    def show(self, value: float | None) -> str:
        """A value for a person."""
        if value is None or math.isnan(value):
            return UNKNOWN
        return percent(value) if self.share else f"{value:.4g}"

    def difference(self, value: float) -> str:
        """A difference of two values, without a sign of its own."""
        return f"{100 * value:.2f}" if self.share else f"{value:.3g}"

    def gain(self, one: float, other: float) -> float:
        """How much better the first value is; negative where it is worse."""
        return one - other if self.greater_is_better else other - one


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed.

    Attributes:
        criterion, schedule, ratio, length: the strategy; `length` in words.
        values: the metric, one a seed.
        costs: means over the seeds: `epochs`, `optimizer_steps`, `seconds`, `scoring_batches`.
        failed: runs without a value.
        steps: pruning steps.
    """

    criterion: str
    schedule: str
    ratio: float
    length: str
    values: tuple[float, ...]
    costs: dict[str, float | None]
    failed: int = 0
    steps: int = 1

    @property
    def mean(self) -> float | None:
        """Over the seeds; None where no run has a value."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def sd(self) -> float | None:
        """The standard deviation over the seeds (n - 1); None for fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def place(self) -> tuple[Any, ...]:
        """What is alike where schedules are compared."""
        return self.ratio, self.length, self.criterion

    @property
    def where(self) -> str:
        """The ratio, as sentences say it."""
        return f"{self.ratio:.4g}"

    def named(self, criterion: bool) -> str:
        """The strategy, as sentences say it; whether with its criterion."""
        return f"{self.criterion} {self.schedule}" if criterion else self.schedule

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "values": list(self.values), "mean": self.mean, "sd": self.sd}


@dataclass(frozen=True)
class Claim:
    """One of the source's claims.

    Attributes:
        number: in the source's order.
        text: what it says.
        verdict: `confirmed`, `not confirmed` or `undecided`.
        numbers: on what that rests.
    """

    number: int
    text: str
    verdict: str
    numbers: str


def spread(one: Group, other: Group) -> float | None:
    """How far two runs of two groups lie apart by their seeds alone; None where a group has fewer than two."""
    if one.sd is None or other.sd is None:
        return None
    return math.hypot(one.sd, other.sd)


def sentence(measure: Measure, groups: Sequence[Group], criteria: bool = False, lengths: bool = False) -> str:
    """Who won at one ratio and length, by how much, and whether that is more than the seeds' spread.

    Args:
        measure: the metric.
        groups: the strategies there.
        criteria: whether a strategy is named with its criterion.
        lengths: whether the length is said.
    """
    where = f"at {groups[0].where}" + (f" with {groups[0].length}" if lengths else "")
    known = [group for group in groups if group.values]
    if not known:
        return f"{where} no run gave a value"
    ranked = sorted(known, key=lambda group: -measure.gain(group.mean, 0.0))
    first = f"{ranked[0].named(criteria)} ({_shown(measure, ranked[0])})"
    if len(ranked) == 1:
        return f"{where} only {first} was run"
    best, second = ranked[:2]
    gap, apart = measure.gain(best.mean, second.mean), spread(best, second)
    unit = " points" if measure.share else ""
    by = f"{measure.difference(gap)}{unit} ahead of {second.named(criteria)} ({_shown(measure, second)})"
    if apart is None:
        return f"{where} {first} is {by}; a single seed tells no spread, so this decides nothing"
    size = f"the seeds' spread of {measure.difference(apart)}"
    if gap > apart:
        return f"{where} {first} wins, {by}: more than {size}"
    return f"{where} {first} is {by}: within {size}, so undecided"


def claims(measure: Measure, groups: Iterable[Group], family: str, removal: bool = False) -> list[Claim]:
    """What these runs say of the five claims of "One Shot vs. Iterative" (Janusz et al., arXiv 2508.13836).

    A claim is a list of comparisons. One that exceeds the seeds' spread speaks for it or against it. It is confirmed
    where more than half speak for it and none against, not confirmed where more speak against it than for it.

    Args:
        measure: the metric.
        groups: the strategies.
        family: of the model, as `schedules.advise` takes it.
        removal: whether units were removed.
    """
    found = [group for group in groups if group.values]
    judged = Judge(measure, found)
    convolutional = family == "convolutional"
    low = [group for group in found if group.ratio < 0.8]
    high = [group for group in found if group.ratio > 0.8 or removal or family in ("transformer", "language")]
    small = [group for group in found if family == "language" and group.ratio <= 0.2]
    one_shot_wins = judged.pairs(low if convolutional and not removal else [], ["one_shot"], ITERATIVE)
    geometric = judged.pairs(high, ["geometric"], ["one_shot", "constant"])
    hybrid = judged.pairs(found, ["hybrid"], ["one_shot", *ITERATIVE])
    loses = [judged.against_dense(group, better=group.schedule != "one_shot") for group in small]
    return [
        judged.claim(1, "one-shot beats iterative below about 80 % on convolutional networks", one_shot_wins,
                     "no such run below 0.8 on weights of a convolutional network"),
        judged.claim(2, "geometric beats one-shot above that (and for transformers and removal), and mostly constant",
                     geometric, "no such run"),
        judged.claim(3, "hybrid is best at nearly all ratios", hybrid, "no hybrid beside another schedule"),
        judged.claim(4, "gradients (Taylor, Hessian) help one-shot at 70 to 88 %, above 90 % all criteria are equal",
                     judged.criteria(), "no norm beside a gradient criterion with one_shot at these ratios"),
        judged.claim(5, "small language models: one-shot loses at 10 to 20 % already, iterative first gains", loses,
                     "no language model at 0.2 or below"),
    ]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One comparison: 1 speaks for a claim, -1 against it, 0 for neither."""

    speaks: int
    words: str


class Judge:
    """Finds the comparisons that a claim rests on."""

    def __init__(self, measure: Measure, groups: Sequence[Group]):
        self.measure, self.groups = measure, groups

    def pairs(self, groups: Sequence[Group], better: Sequence[str], than: Sequence[str]) -> list[Case]:
        """Each of some schedules beside each of others, all else alike."""
        return [
            self.case(one, other)
            for one, other in product(groups, groups)
            if one.schedule in better and other.schedule in than and one.place == other.place
        ]

    def criteria(self) -> list[Case]:
        """Gradients beside norms with one_shot: better at .7 to .88, alike above .9."""
        cases = []
        for one, other in product(self.groups, self.groups):
            alike = (one.ratio, one.length, one.schedule) == (other.ratio, other.length, other.schedule)
            if not (alike and one.schedule == "one_shot" and _is(one, _GRADIENTS) and _is(other, _NORMS)):
                continue
            case = self.case(one, other, criteria=True)
            if 0.7 <= one.ratio <= 0.88:
                cases.append(case)
            elif one.ratio > 0.9:
                cases.append(Case(-1 if case.speaks else 1, case.words))
        return cases

    def case(self, one: Group, other: Group, criteria: bool = False) -> Case:
        """Whether the first group is better, by more than the seeds' spread."""
        gap, apart = self.measure.gain(one.mean, other.mean), spread(one, other)
        speaks = 0 if apart is None or abs(gap) <= apart else (1 if gap > 0 else -1)
        around = "one seed" if apart is None else f"spread {self.measure.difference(apart)}"
        sides = f"{one.named(criteria)} {self.measure.show(one.mean)} against {other.named(criteria)} "
        return Case(speaks, f"{one.where}: {sides}{self.measure.show(other.mean)} ({around})")

    def against_dense(self, group: Group, better: bool) -> Case:
        """Whether a group is better, or worse, than the dense model by more than its seeds' spread."""
        gap = self.measure.gain(group.mean, self.measure.dense)
        gap, apart = gap if better else -gap, group.sd
        speaks = 0 if apart is None or abs(gap) <= apart else (1 if gap > 0 else -1)
        show = self.measure.show
        return Case(speaks, f"{group.where}: {group.schedule} {show(group.mean)}, dense {show(self.measure.dense)}")

    @staticmethod
    def claim(
        number: int,
        text: str,
        cases: Sequence[Case],
        missing: str,
        enough: int | None = None,
        neither: str = "within the spread",
    ) -> Claim:
        """The verdict on a list of comparisons.

        Args:
            number, text: of the claim.
            cases: the comparisons.
            missing: what there is none of, where the list is empty.
            enough: for a claim that something happens at times: how many comparisons for it confirm it, where fewer
                speak against it.
            neither: what the others are.
        """
        if not cases:
            return Claim(number, text, UNDECIDED, f"nothing here tests it: {missing}")
        good, bad = (sum(case.speaks == sign for case in cases) for sign in (1, -1))
        holds = not bad and 2 * good > len(cases) if enough is None else good >= enough and good > bad
        verdict = REFUTED if bad > good else CONFIRMED if holds else UNDECIDED
        count = f"{good} of {len(cases)} comparisons for it, {bad} against, {len(cases) - good - bad} {neither}"
        told = sorted(cases, key=lambda case: -abs(case.speaks))[:_MOST_NUMBERS]
        more = f"; and {len(cases) - len(told)} more" if len(cases) > len(told) else ""
        return Claim(number, text, verdict, f"{count}: {'; '.join(case.words for case in told)}{more}")


def _is(group: Group, names: Sequence[str]) -> bool:
    return group.criterion.split()[0] in names


def _shown(measure: Measure, group: Group) -> str:
    around = "" if group.sd is None else f" ± {measure.difference(group.sd)}"
    return f"{title(measure.name)} {measure.show(group.mean)}{around}"
