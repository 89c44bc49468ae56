"""How a target becomes a choice of units: by count, by parameters and multiplications, by measured time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from hfprune.config import PruningConfig
from hfprune.errors import ConfigError
from hfprune.profiling import measure
from hfprune.structure.candidates import candidates
from hfprune.structure.removal import remove
from hfprune.structure.targets import Selection, Solver, solve

if TYPE_CHECKING:
    from hfprune.structure.pruner import StructuredPruner

TOLERANCE = 0.02


@dataclass
class Dense:
    """What the model was before anything was removed; plain numbers, so that a resumed run still knows.

    Attributes:
        units: group name to its number of units.
        kinds: group name to its kind.
        blocks: how many residual blocks there were.
        params, macs: of the whole model.
        latency: milliseconds at the target's batch size, where latency is the target.
    """

    units: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    blocks: int = 0
    params: float = 0.0
    macs: float = 0.0
    latency: float | None = None

    def targets(self, config: PruningConfig) -> list[float]:
        """The cumulative fraction gone after each step; an absolute target becomes a fraction of the dense model.

        Raises:
            ConfigError: the target is more than the dense model has.
        """
        target = config.target
        if target.fraction is not None:
            return config.targets()
        dense = getattr(self, target.kind)
        if target.absolute() >= dense:
            raise ConfigError(f"pruning.target.{target.kind}: the dense model has {dense:.4g}, less than that already")
        return config.schedule.targets(1 - target.absolute() / dense)


@dataclass
class Choice:
    """What is to go in one step.

    Attributes:
        units: group name to the indices of the units.
        blocks: paths of residual blocks.
        reached: the fraction that is gone afterwards, of what the target measures.
        note: where the target was not met: what stood in the way.
    """

    units: Selection
    blocks: list[str]
    reached: float
    note: str = ""


def by_ratio(pruner: StructuredPruner, target: float, scores: dict[str, torch.Tensor], blocks: list[str]) -> Choice:
    """The units that go when a fraction of them is asked for; groups with a ratio of their own stand apart."""
    solver = Solver(candidates(pruner, scores, "ratio"), pruner.config.scope, pruner.config.round_to)
    sizes = pruner.group_sizes()
    if pruner.config.scope == "layer":
        chosen = solver.choose(0.0, _even_counts(pruner, solver, target))
    else:
        own = {name for group in solver.groups if group.ratio is not None for name in group.parts or (group.name,)}
        total = sum(dense for name, (dense, _) in sizes.items() if name not in own)
        left = sum(now for name, (_, now) in sizes.items() if name not in own)

        def cost(selection: Selection) -> float:
            return left - sum(len(units) for name, units in selection.items() if name not in own)

        wanted, least = total - round(target * total), cost(solver.choose(1.0))
        if least > wanted + TOLERANCE * total:
            most = math.floor((total - least) / total * 1e4) / 1e4
            raise ConfigError(
                f"pruning.target.ratio: {target:g} would empty a layer; at most {most:g} of the units can go "
                f"(min_kept {pruner.config.min_kept})"
            )
        chosen = solve(solver, cost, wanted, tolerance=0.0)
    total = sum(dense for dense, _ in sizes.values())
    gone = sum(dense - now for dense, now in sizes.values()) + sum(len(units) for units in chosen.values())
    reached = gone / total if total else 0.0
    note = ""
    if abs(reached - target) > TOLERANCE and not pruner.config.per_layer:
        note = f"{reached:.1%} of the units instead of {target:.1%}: round_to {pruner.config.round_to} and min_kept"
    return Choice(chosen, blocks, reached, note)


def _even_counts(pruner: StructuredPruner, solver: Solver, target: float) -> dict[str, int]:
    """How many units of each group go, when every group is cut by the same fraction."""
    counts = {}
    for group in solver.groups:
        now = len(group.scores)
        dense = now * pruner.dense_units(pruner.groups[group.name]) // pruner.groups[group.name].units
        wanted = round(group.ratio * now) if group.ratio is not None else round(target * dense) - (dense - now)
        if wanted >= now and not pruner.config.min_kept:
            ratio = group.ratio if group.ratio is not None else target
            raise ConfigError(
                f"pruning.target.ratio: {ratio:g} would empty '{group.name}', which has {dense} units; use a smaller "
                f"ratio, per_layer, ignore, or min_kept: 1"
            )
        counts[group.name] = solver.rounded(group, max(0, wanted))
    return counts


def by_cost(
    pruner: StructuredPruner, measured: str, left: float, scores: dict[str, torch.Tensor], blocks: list[str]
) -> Choice:
    dense = getattr(pruner.dense, measured)
    costs = getattr(pruner.structure.costs, measured)
    solver = Solver(candidates(pruner, scores, measured), pruner.config.scope, pruner.config.round_to)

    def cost(selection: Selection) -> float:
        return costs(pruner.structure.gone(selection))

    least = cost(solver.choose(1.0))
    if least > left * dense * (1 + TOLERANCE):
        raise ConfigError(
            f"pruning.target.{measured}: {left:.2%} of the dense model can't be reached; the protected part and "
            f"what every layer keeps cost {least / dense:.2%}"
        )
    chosen = solve(solver, cost, left * dense, TOLERANCE)
    reached = cost(chosen) / dense
    note = ""
    if abs(reached - left) > TOLERANCE * left:
        note = (
            f"{reached:.2%} of the {measured} instead of {left:.2%}: whole units, rounded to {pruner.config.round_to}"
        )
    return Choice(chosen, blocks, 1 - reached, note)


def by_latency(pruner: StructuredPruner, left: float, scores: dict[str, torch.Tensor], blocks: list[str]) -> Choice:
    """Tries selections by multiply-accumulates until the measured time fits; every try is taken back."""
    if pruner.dense.latency is None:
        pruner.dense.latency = milliseconds(pruner)
    low, high, guess = 0.0, 1.0, left
    best: Choice | None = None
    for _ in range(7):
        try:
            choice = by_cost(pruner, "macs", guess, scores, blocks)
        except ConfigError:
            low, guess = guess, (guess + high) / 2
            continue
        removal = remove(pruner.structure, choice.units) if choice.units else None
        found = milliseconds(pruner) / pruner.dense.latency
        if removal is not None:
            removal.journal.rollback()
        choice.reached = 1 - found
        if best is None or abs(choice.reached - 1 + left) < abs(best.reached - 1 + left):
            best = choice
        if abs(found - left) <= TOLERANCE * left:
            break
        low, high = (guess, high) if found < left else (low, guess)
        guess = (low + high) / 2
    if best is None:
        raise ConfigError(f"pruning.target.latency: {left:.2%} of the dense time can't be reached")
    if abs(1 - best.reached - left) > TOLERANCE * left:
        best.note = f"{best.reached:.1%} of the dense time instead of {left:.1%}, at batch {pruner.config.target.batch}"
    return best


def milliseconds(pruner: StructuredPruner) -> float:
    """Median milliseconds of a forward pass at the target's batch size."""
    batch = pruner.config.target.batch
    return measure(pruner.model, pruner.example_inputs, (batch,), repeats=7).latency_ms[batch]


def choose_blocks(pruner: StructuredPruner, target: float, scores: list[float]) -> list[str]:
    """The paths of the blocks that go.

    Blocks alone carry the whole target. Together with other granularities and a target of parameters, multiplications
    or time, they take the share 1 - sqrt(left) of it and the units inside the rest, so that both cut by like factors.
    """
    if not pruner.blocks or not pruner.dense.blocks:
        return []
    if pruner.measured != "ratio" and pruner.groups:
        target = 1 - math.sqrt(1 - target)
    of_time = pruner.measured == "latency"
    weights = _block_costs(pruner, "macs" if of_time else pruner.measured)
    dense = pruner.dense.blocks if pruner.measured == "ratio" else pruner.dense.params
    dense = pruner.dense.macs if pruner.measured in ("macs", "latency") else dense
    now = dense - len(pruner.plan.dropped)
    if pruner.measured != "ratio":
        now = pruner.structure.costs.params() if pruner.measured == "params" else pruner.structure.costs.macs()
    excess = now - (1 - target) * dense
    order = sorted(range(len(pruner.blocks)), key=lambda index: (scores[index], index))
    left = {path: len(pruner.model.get_submodule(path)) for path in {b.container for b in pruner.blocks}}
    chosen = []
    for index in order:
        block = pruner.blocks[index]
        if excess >= weights[index] / 2 and left[block.container] > 1:  # the nearest whole number of blocks
            chosen.append(index)
            excess -= weights[index]
            left[block.container] -= 1
    return [pruner.blocks[index].path for index in sorted(chosen)]


def _block_costs(pruner: StructuredPruner, measured: str) -> list[float]:
    """What each block costs; 1 where blocks are counted."""
    if measured == "ratio":
        return [1.0] * len(pruner.blocks)
    if measured == "params":
        modules = [pruner.model.get_submodule(block.path) for block in pruner.blocks]
        return [float(sum(p.numel() for p in module.parameters())) for module in modules]
    return [pruner.structure.costs.macs_of(block.path) for block in pruner.blocks]


def blocks_alone(pruner: StructuredPruner, target: float, blocks: list[str]) -> Choice:
    """A choice of whole blocks and nothing else."""
    chosen = {
        block.path: cost for block, cost in zip(pruner.blocks, _block_costs(pruner, pruner.measured), strict=True)
    }
    gone = sum(chosen[path] for path in blocks)
    if pruner.measured == "ratio":
        reached = (len(pruner.plan.dropped) + gone) / max(1, pruner.dense.blocks)
    else:
        measured = "params" if pruner.measured == "params" else "macs"
        now = getattr(pruner.structure.costs, measured)()
        reached = 1 - (now - gone) / getattr(pruner.dense, measured)
    note = f"{reached:.1%} gone instead of {target:.1%}: blocks go whole" if abs(reached - target) > TOLERANCE else ""
    return Choice({}, blocks, reached, note)
