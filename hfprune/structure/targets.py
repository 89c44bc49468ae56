"""Which units go, so that a target is met: the least score for what is saved, whole rounding steps, floors kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Selection = dict[str, torch.Tensor]
"""Group name to the indices of the units that go, ascending."""


@dataclass(frozen=True)
class Candidates:
    """The units of one group, as a choice sees them.

    Attributes:
        name: the group's.
        scores: importance, shape (units,), comparable between groups that are ranked together.
        savings: what the removal of one unit saves, shape (units,); ones where units are counted.
        peers: groups of the same value are ranked together.
        channels: channels a unit takes, for rounding.
        most: the most units that may go.
        ratio: a ratio of its own, or None.
        parts: of linked groups, which count as one: group name to the units that each of the common pieces stands for.
    """

    name: str
    scores: torch.Tensor
    savings: torch.Tensor
    peers: str
    channels: int
    most: int
    ratio: float | None = None
    parts: dict[str, list[torch.Tensor]] | None = None

    @property
    def order(self) -> torch.Tensor:
        """Unit indices, the least important first."""
        return torch.sort(self.scores, stable=True).indices


@dataclass
class Solver:
    """Chooses units by one number, the level: 0 removes nothing, 1 all that may go.

    Attributes:
        groups: the candidates.
        scope: `global` (all peers by score per saving), `isomorphic` (every set of peers to the same fraction, ranked
            within) or `layer` (every group to the same fraction).
        round_to: the channels that stay are a multiple of this, where a group is large enough.
    """

    groups: list[Candidates]
    scope: str
    round_to: int
    _ranked: dict[str, list[tuple[str, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for peers in dict.fromkeys(self._peers(group) for group in self.groups):
            members = [group for group in self.groups if self._peers(group) == peers and group.ratio is None]
            entries = []
            for group in members:
                cheapness = group.scores / group.savings.clamp_min(1e-12)
                for rank, unit in enumerate(group.order[: group.most].tolist()):
                    entries.append((float(cheapness[unit]), rank, group.name, unit))
            entries.sort(key=lambda entry: entry[:3])
            self._ranked[peers] = [(name, unit) for _, _, name, unit in entries]

    def _peers(self, group: Candidates) -> str:
        return {"global": "", "isomorphic": group.peers, "layer": group.name}[self.scope]

    @property
    def removable(self) -> int:
        """How many units may go in all."""
        return sum(group.most for group in self.groups)

    def choose(self, level: float, counts: dict[str, int] | None = None) -> Selection:
        """What goes at a level; `counts` gives the number of units of some groups instead."""
        wanted: dict[str, int] = {}
        for ranked in self._ranked.values():
            for name, _ in ranked[: round(level * len(ranked))]:
                wanted[name] = wanted.get(name, 0) + 1
        chosen = {}
        for group in self.groups:
            count = wanted.get(group.name, 0)
            if self.scope == "layer" and group.ratio is None:
                count = round(level * group.most)
            if group.ratio is not None:
                count = round(group.ratio * len(group.scores))
            count = self.rounded(group, count)
            if counts is not None and group.name in counts:
                count = counts[group.name]
            if count and group.parts is None:
                chosen[group.name] = group.order[:count].sort().values
            elif count:
                for name, pieces in group.parts.items():
                    chosen[name] = torch.cat([pieces[i] for i in group.order[:count].tolist()]).sort().values
        return chosen

    def count(self, group: Candidates, selection: Selection) -> int:
        """How many of a group's units a selection takes; of linked groups how many pieces."""
        if group.parts is None:
            return len(selection.get(group.name, ()))
        name, pieces = next(iter(group.parts.items()))
        return len(selection.get(name, ())) // len(pieces[0])

    def rounded(self, group: Candidates, count: int) -> int:
        """The nearest number of units for which the kept channels are a multiple of `round_to`."""
        step = self.step(group)
        total = len(group.scores)
        kept = total - min(count, group.most)
        if step == 1 or kept == total:
            return total - kept
        rounded = max(step, round(kept / step) * step)
        while total - rounded > group.most:
            rounded += step
        return max(0, total - rounded)

    def step(self, group: Candidates) -> int:
        """Units that go or stay at once, for rounding; 1 where the group is too small to be rounded."""
        if self.round_to <= 1 or group.channels % self.round_to == 0:
            return 1
        step = self.round_to // torch.gcd(torch.tensor(self.round_to), torch.tensor(group.channels)).item()
        return step if len(group.scores) >= 2 * step else 1


def solve(solver: Solver, cost: Callable[[Selection], float], wanted: float, tolerance: float = 0.02) -> Selection:
    """The selection whose cost comes nearest to `wanted`.

    Args:
        solver: the candidates.
        cost: what is left of the model when a selection is gone; falls as more goes.
        wanted: the cost to reach.
        tolerance: relative; below it single rounding steps are no longer tried.
    """
    best, now = _bisect(solver, cost, wanted, tolerance, {})
    if abs(now - wanted) > tolerance * wanted:
        # One step of a linked group is large: with it fixed, the others come nearer.
        coarse = {group.name: solver.count(group, best) for group in solver.groups if group.parts is not None}
        for name, count in coarse.items():
            for other in (count, count - 1, count + 1):
                if 0 <= other <= next(group.most for group in solver.groups if group.name == name):
                    found = _bisect(solver, cost, wanted, tolerance, coarse | {name: other})
                    best, now = min((best, now), found, key=lambda pair: abs(pair[1] - wanted))
    return _finish(solver, cost, wanted, tolerance, best, now)


def _bisect(
    solver: Solver, cost: Callable[[Selection], float], wanted: float, tolerance: float, fixed: dict[str, int]
) -> tuple[Selection, float]:
    """The level whose cost is nearest, with the counts of some groups fixed; the selection and its cost."""
    low, high = 0.0, 1.0
    candidates = [solver.choose(level, fixed) for level in (0.0, 1.0)]
    best, best_cost = min(((c, cost(c)) for c in candidates), key=lambda pair: abs(pair[1] - wanted))
    for _ in range(24):
        level = (low + high) / 2
        selection = solver.choose(level, fixed)
        now = cost(selection)
        if abs(now - wanted) < abs(best_cost - wanted):
            best, best_cost = selection, now
        low, high = (level, high) if now > wanted else (low, level)
        if abs(now - wanted) <= tolerance / 8 * wanted:
            break
    return best, best_cost


def _finish(
    solver: Solver, cost: Callable[[Selection], float], wanted: float, tolerance: float, best: Selection, now: float
) -> Selection:
    """Single rounding steps, the one that helps most first, until the tolerance is met."""
    for _ in range(64):
        if abs(now - wanted) <= tolerance * wanted:
            break
        counts = {group.name: solver.count(group, best) for group in solver.groups}
        options = []
        for group in solver.groups:
            step = solver.step(group) * (1 if now > wanted else -1)
            count = counts[group.name] + step
            if group.ratio is None and 0 <= count <= group.most:
                selection = solver.choose(0.0, counts | {group.name: count})
                options.append((abs(cost(selection) - wanted), group.name, selection))
        if not options or min(options, key=lambda o: o[:2])[0] >= abs(now - wanted):
            break
        best = min(options, key=lambda option: option[:2])[2]
        now = cost(best)
    return best
