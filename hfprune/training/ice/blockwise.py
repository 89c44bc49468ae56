"""Block by block: one step prunes the units of one residual block, by masks or by removal."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from hfprune.errors import ConfigError
from hfprune.masks import MaskSet
from hfprune.structure.blocks import find_blocks
from hfprune.structure.candidates import candidates
from hfprune.structure.choices import Choice
from hfprune.structure.groups import Structure, analyse
from hfprune.structure.targets import Solver
from hfprune.training.masking import Masking
from hfprune.training.removal import AgreedPruner, Removal, example_of
from hfprune.training.shards.cutting import ShardedRemoval

if TYPE_CHECKING:
    from hfprune.training.trainer import PruningTrainer


class BlockwiseMasking(Masking):
    """Masking in which every step takes the weights of one block to the configuration's ratio.

    Raises:
        ConfigError: the model has no residual blocks.
        ModelError: its structure can't be analysed.
    """

    def __init__(self, trainer: PruningTrainer):
        super().__init__(trainer)
        weights = self.pruner.weights
        place = places(analyse(trainer.model, example_of(trainer)))
        self.parts: dict[str, list[str]] = {}
        for name in sorted(weights, key=lambda name: place(name)[0]):
            self.parts.setdefault(place(name)[1], []).append(name)

    @property
    def blocks(self) -> list[str]:
        return list(self.parts)

    def targets(self) -> list[float]:
        ratio, units = self.trainer.pruning.ratio, self.pruner.units
        gone = itertools.accumulate(ratio * sum(units[name] for name in names) for names in self.parts.values())
        return [value / self.pruner.total_units for value in gone]

    def _masks_at(self, target: float) -> MaskSet:
        """The masks after the step of the running phase; those of other blocks stay as they are."""
        with self._only(self.trainer.progress.phase) as share:
            return super()._masks_at(share)

    def _gone_at(self, target: float, masks: MaskSet) -> int:
        return self.pruner.gone(masks)

    @contextmanager
    def _only(self, index: int) -> Iterator[float]:
        """The pruner narrowed to one block; gives the target at which all blocks so far hold the ratio exactly."""
        pruner, ratio = self.pruner, self.trainer.pruning.ratio
        names = list(itertools.chain(*list(self.parts.values())[: index + 1]))
        counted = [name for name in names if name not in pruner.counts.own_ratio]
        here = [name for name in list(self.parts.values())[index] if name not in pruner.counts.own_ratio]
        share = ratio
        if pruner.config.scope == "global" and pruner.shape.kind != "n:m" and here:
            now, so_far = (sum(pruner.units[name] for name in some) for some in (here, counted))
            share = (round(ratio * so_far) - round(ratio * (so_far - now))) / now
        with pruner.only(list(self.parts.values())[index]):
            yield share


class BlockwisePruner(AgreedPruner):
    """A pruner of which one block at a time is looked at.

    Attributes:
        part: the index of the block; None for all.
        parts: paths of the blocks, in order; `of_group` gives the index to every group's name.
    """

    part: int | None = None

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        place = places(self.structure)
        found = {name: place(group.members[0].tensor) for name, group in self.groups.items()}
        for link in self.structure.links:  # what is cut only together goes in one step
            first = min((found[name] for name in link if name in found), default=None)
            found |= {name: first for name in link if name in found}
        self.parts = [path for _, path in sorted(set(found.values()))]
        self.of_group = {name: self.parts.index(path) for name, (_, path) in found.items()}
        ones = {name: torch.ones(group.units) for name, group in self.groups.items()}
        found_own = [group for group in candidates(self, ones, self.measured) if group.ratio is not None]
        self._own = {name for group in found_own for name in group.parts or (group.name,)}
        self._fractions = self._shares(ones)

    def targets(self) -> list[float]:
        final = super().targets()[-1]
        return [final * fraction for fraction in self._fractions]

    def _use(self, structure: Structure) -> None:
        super()._use(structure)
        if self.part is not None:
            self.groups = {name: group for name, group in self.groups.items() if self.of_group.get(name) == self.part}

    def look_at(self, part: int | None) -> None:
        """Narrows all that follows to one block; None widens it to all."""
        self.part = part
        if self._stale:
            self._look()
        else:
            self._use(self.structure)

    def target_of(self, target: float) -> float:
        """The target to choose by for a cumulative one: what `by_ratio` counts, which sees one block's groups."""
        if self.measured != "ratio":
            return target
        final = super().targets()[-1]
        if self.config.scope == "layer":
            return final
        sizes = self.group_sizes()
        so_far = [size for name, size in sizes.items() if self.of_group[name] <= self.part and name not in self._own]
        due = round(final * sum(dense for dense, _ in so_far)) - sum(dense - now for dense, now in so_far)
        seen = [size for name, size in sizes.items() if self.of_group[name] != self.part or name not in self._own]
        gone, total = sum(dense - now for dense, now in seen), sum(dense for dense, _ in seen)
        return (gone + max(0, due)) / max(1, total)

    def _shares(self, ones: dict[str, torch.Tensor]) -> list[float]:
        """The part of the whole that may go by the end of each step: of units, or of what all blocks can save."""
        if self.measured == "ratio":
            units = [sum(n for name, n in self.dense.units.items() if self.of_group[name] == part)
                     for part in range(len(self.parts))]  # fmt: skip
            return [value / max(1, sum(units)) for value in itertools.accumulate(units)]
        solver = Solver(candidates(self, ones, self.measured), "global", self.config.round_to)
        most = solver.choose(1.0)
        cost, saved = getattr(self.structure.costs, self.measured), []
        nothing = cost(self.structure.gone({}))
        for part in range(len(self.parts)):
            chosen = {name: units for name, units in most.items() if self.of_group[name] <= part}
            saved.append(nothing - cost(self.structure.gone(chosen)))
        return [value / max(1.0, saved[-1]) for value in saved]


class BlockwiseRemoval(Removal):
    """Removal in which every step cuts one block, so that all are cut alike.

    Raises:
        ConfigError: the model has no residual blocks, or nothing in them that the granularity names.
    """

    def _pruner_of(self, trainer: PruningTrainer) -> BlockwisePruner:
        return BlockwisePruner(trainer.model, trainer.pruning, example_of(trainer), seed=trainer.args.seed, trial=False)

    @property
    def blocks(self) -> list[str]:
        return self.pruner.parts

    def _step(self, target: float) -> Choice:
        return self._cut(self.trainer.progress.phase, target)

    def _cut(self, index: int, target: float) -> Choice:
        pruner = self.pruner
        pruner.look_at(index)
        try:
            choice = super()._step(pruner.target_of(target))
        finally:
            pruner.look_at(None)
        if pruner.measured == "ratio":
            # A choice counts what it sees: of the whole, what is gone is known now.
            choice.reached = pruner.gone_units() / pruner.total_units
            choice.note = "" if pruner.config.scope == "layer" else choice.note
        return choice

    def preview(self, target: float) -> tuple[dict[str, Any], dict[str, Any]]:
        try:
            for index, reached in enumerate(self.targets()):
                self.note = self._cut(index, reached).note
            return self.report(), self.facts()
        finally:
            self.pruner.undo()


def method_of(trainer: PruningTrainer) -> Masking | Removal:
    """How a trainer's configuration prunes."""
    if trainer.pruning.strategy is not None:
        return BlockwiseRemoval(trainer) if trainer.pruning.is_structural else BlockwiseMasking(trainer)
    if not trainer.pruning.is_structural:
        return Masking(trainer)
    return Removal(trainer) if trainer.shards is None else ShardedRemoval(trainer)


def places(structure: Structure) -> Callable[[str], tuple[int, str]]:
    """What tells the block that a tensor goes with, as (index, path).

    That is the block it lies in. What lies in none goes with the block before it in the model's order, and what stands
    before all blocks with the first.

    Raises:
        ConfigError: there are no residual blocks.
    """
    order = {node: index for index, node in enumerate(structure.graph.nodes)}
    blocks = sorted(find_blocks(structure, droppable=False), key=lambda block: order[block.exit])
    paths = [block.path for block in blocks]
    if not paths:
        kind = type(structure.model).__name__
        raise ConfigError(f"pruning.strategy: ice goes from residual block to residual block, and {kind} has none")
    found, last = {}, 0
    for name in structure.model.state_dict():
        inside = next((index for index, path in enumerate(paths) if name.startswith(f"{path}.")), None)
        last = last if inside is None else inside
        found[name] = last
    return lambda name: (found[name], paths[found[name]])
