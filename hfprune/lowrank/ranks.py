"""Which layers are factored, and to which ranks: the least score lost for a cost, dense where factoring saves none."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Ranks = dict[str, int | None]
"""Path to rank; None for a layer that stays dense."""


@dataclass(frozen=True)
class Candidate:
    """One layer, as the choice sees it.

    Attributes:
        path: its name.
        scores: importance of its components, falling; what it loses at a rank is the sum of those behind.
        unit: what one component costs.
        whole: what the dense layer costs.
        least, most: the ranks between which it may be factored.
        step: its ranks are multiples of this.
        dense: whether it may stay dense.
        full: how many components it had in the dense model.
        peers: layers of the same value are cut by the same fraction.
        fixed: whether its rank is given: `most`, or dense where it may be.
    """

    path: str
    scores: np.ndarray
    unit: float
    whole: float
    least: int
    most: int
    step: int = 1
    dense: bool = True
    full: int = 0
    peers: str = ""
    fixed: bool = False

    @cached_property
    def lost(self) -> np.ndarray:
        """What is lost at each rank, from 0 on."""
        return np.append(np.cumsum(self.scores[::-1])[::-1], 0.0)

    @property
    def largest(self) -> int | None:
        """The choice that loses least."""
        return None if self.dense else self.most

    def cost(self, rank: int | None) -> float:
        """What the layer costs at a rank."""
        return self.whole if rank is None else self.unit * rank

    def best(self, price: float) -> int | None:
        """The rank at which what is lost, plus the price of what it costs, is least."""
        rank = int(np.searchsorted(-self.scores, -price * self.unit))
        rank = min(self.most, max(self.least, rank // self.step * self.step))
        if self.dense and price * self.whole <= self.lost[rank] + price * self.unit * rank:
            return None
        return rank


def choose(candidates: Iterable[Candidate], wanted: float, scope: str, counted: bool = False) -> Ranks:
    """The ranks with the least loss whose cost is at most `wanted`; the smallest where none reach that.

    Args:
        candidates: the layers.
        wanted: the cost of all of them together.
        scope: `global` ranks all components together, `isomorphic` and `layer` cut all sets of peers, or all layers, to
            the same fraction of their cost.
        counted: whether components are counted, and `layer` means the same fraction of every layer exactly.
    """
    candidates = list(candidates)
    found: Ranks = {c.path: c.largest for c in candidates if c.fixed}
    wanted -= sum(c.cost(found[c.path]) for c in candidates if c.fixed)
    free = [c for c in candidates if not c.fixed]
    if scope == "global":
        return found | _within(free, wanted)
    sets: dict[str, list[Candidate]] = {}
    for candidate in free:
        sets.setdefault(candidate.path if scope == "layer" else candidate.peers, []).append(candidate)
    dense = sum(c.whole for c in free)

    def at(fraction: float) -> Ranks:
        chosen: Ranks = {}
        for members in sets.values():
            if scope == "layer":
                chosen |= {c.path: _share(c, fraction) for c in members}
            else:
                chosen |= _within(members, fraction * sum(c.whole for c in members))
        return chosen

    if counted and scope == "layer":
        return found | at(wanted / dense if dense else 0.0)
    low, high = 0.0, 1.0
    if total(free, at(high)) <= wanted:
        return found | at(high)
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if total(free, at(middle)) <= wanted else (low, middle)
    return found | at(low)


def total(candidates: Iterable[Candidate], ranks: Ranks) -> float:
    """What the layers cost together."""
    return sum(c.cost(ranks[c.path]) for c in candidates)


def smallest(candidates: Iterable[Candidate]) -> Ranks:
    """The ranks beyond which nothing goes."""
    return {c.path: c.largest if c.fixed else c.least for c in candidates}


def _share(candidate: Candidate, fraction: float) -> int | None:
    """The rank at a fraction of one layer's cost."""
    rank = int(fraction * candidate.whole / candidate.unit + 1e-9) // candidate.step * candidate.step
    return candidate.largest if rank > candidate.most else max(candidate.least, rank)


def _within(candidates: list[Candidate], wanted: float) -> Ranks:
    """The least loss within a cost: by bisecting the price of a unit of cost, then spending what is left over."""
    largest = {c.path: c.largest for c in candidates}
    if total(candidates, largest) <= wanted:
        return largest
    low, high = 0.0, max((_highest_price(c) for c in candidates), default=0.0)
    for _ in range(80):
        price = (low + high) / 2
        cost = total(candidates, {c.path: c.best(price) for c in candidates})
        low, high = (low, price) if cost <= wanted else (price, high)
    return _spend(candidates, {c.path: c.best(high) for c in candidates}, wanted)


def _highest_price(candidate: Candidate) -> float:
    """A price at which as little stays as may."""
    saved = candidate.whole - candidate.unit * candidate.least
    return 1.001 * max(candidate.scores[0] / candidate.unit, candidate.lost[candidate.least] / saved) + 1e-30


def _spend(candidates: list[Candidate], ranks: Ranks, wanted: float) -> Ranks:
    """Adds components to factored layers, the best for their cost first, as long as the cost allows."""
    left = wanted - total(candidates, ranks)

    def offer(candidate: Candidate) -> None:
        rank = ranks[candidate.path]
        if rank is not None and rank + candidate.step <= candidate.most:
            gain = candidate.scores[rank : rank + candidate.step].sum() / (candidate.unit * candidate.step)
            heapq.heappush(offers, (-gain, candidate.path))

    offers: list[tuple[float, str]] = []
    by_path = {c.path: c for c in candidates}
    for candidate in candidates:
        offer(candidate)
    while offers:
        candidate = by_path[heapq.heappop(offers)[1]]
        price = candidate.unit * candidate.step
        if price <= left:
            ranks[candidate.path] += candidate.step
            left -= price
            offer(candidate)
    return ranks
