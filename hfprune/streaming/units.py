"""Neurons, heads and blocks, cut alike everywhere: planned on shapes, then every tensor is cut from file to file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from hfprune.checkpoint.convert import Tell
from hfprune.checkpoint.internals import names_as_loaded
from hfprune.checkpoint.metadata import BLOCK, annotate, plan_of
from hfprune.config import PruningConfig
from hfprune.errors import CheckpointError, ConfigError
from hfprune.masks import MaskSet
from hfprune.streaming.bound import Bound, of_units
from hfprune.streaming.result import Result
from hfprune.streaming.source import Source
from hfprune.structure.choices import Choice
from hfprune.structure.plan import Plan
from hfprune.structure.pruner import StructuredPruner
from hfprune.structure.record import dense_path
from hfprune.structure.surgery import kept_indices, sliced


class Values(Mapping[str, torch.Tensor]):
    """The parameters of a checkpoint's model by name, each read when it is looked up.

    Args:
        source: the checkpoint.
        plan: of the blocks that the model has lost since; its names are those of the smaller one.
    """

    def __init__(self, source: Source, plan: Plan):
        self.source, self.plan = source, plan
        self._names = [name for name, _ in source.model.named_parameters()]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.source.read(dense_path(self.plan, name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class StreamedUnits(StructuredPruner):
    """A StructuredPruner whose model has no values: scores are made from files, and cuts are tried on shapes alone.

    Args:
        source: the checkpoint.
        config: what to remove.

    Attributes:
        kept: what stays of each tensor that loses something, by its name in the dense model.

    Raises:
        ConfigError: also for what needs values of the whole model.
    """

    def __init__(self, source: Source, config: PruningConfig):
        if "rank" in config.granularities:
            raise ConfigError("pruning.granularity: 'rank' needs the whole model in memory; it can't be streamed")
        super().__init__(source.model, config)
        self.source = source
        self.kept: dict[str, dict[int, torch.Tensor]] = {}
        if self.needs_data or self.criterion.statistics:
            raise ConfigError(
                f"pruning.criterion: '{config.criterion_name}' runs the whole model; with streaming use l1, l2, lamp, "
                f"bn_scale or random for what is removed"
            )
        if self.measured == "latency":
            raise ConfigError("pruning.target.latency: what is streamed can't be timed; use ratio, params or macs")

    def apply(self, choice: Choice) -> None:
        structure = self.structure
        super().apply(choice)
        if choice.units:
            found = kept_indices(structure, structure.gone(choice.units))
            self.kept = {dense_path(self.plan, name): dims for name, dims in found.items()}

    @property
    def values(self) -> Mapping[str, torch.Tensor]:
        return Values(self.source, self.plan)


def bound_of(pruner: StreamedUnits) -> Bound:
    """The most memory that scoring and cutting take."""
    scored = set(pruner.scored())
    for block in pruner.blocks:
        scored |= block.weights(pruner.model).keys()
    return of_units(pruner.source, scored, len(pruner.structure.graph.nodes))


def cut(pruner: StreamedUnits, target: float) -> Choice:
    """Chooses what goes and cuts the model on the meta device.

    Raises:
        ConfigError: what would be left is no stock model.
    """
    choice = pruner.step(target)
    annotate(pruner.model, pruner.config, MaskSet({}), choice.reached, plan=pruner.plan)
    if getattr(pruner.model.config, "quantization_config", None) is not None:
        raise ConfigError(
            f"pruning: cut so, {type(pruner.model).__name__} is none that its config can say, and streaming writes "
            f"stock models alone; cut all layers alike (scope: layer, granularity neuron, head or layer, no per_layer)"
        )
    return choice


def lay_out(pruner: StreamedUnits, folder: Path) -> Result:
    """The files of the smaller model, in a folder.

    Raises:
        CheckpointError: the names of tensors after a block that is gone can't be told.
    """
    source, plan, kept = pruner.source, pruner.plan, pruner.kept
    known = {stored: name for name, stored in source.stored.items()}
    known |= {part: name for name, parts in source.parts.items() for part in parts}
    gone = tuple(f"{path}." for path in plan.dropped)
    places, origins, expected = {}, {}, {}
    for stored, place in source.places.items():
        name = known.get(stored)
        if name is not None and gone and f"{name}.".startswith(gone):
            continue
        now = name if name is None else _after(plan, name)
        new = stored if now == name else _renumbered(stored, name, now)
        if name in kept:
            if name not in source.stored:
                source.place(name)
            shape = tuple(len(kept[name][d]) if d in kept[name] else size for d, size in enumerate(place.shape))
            place = place.cut_to(shape)
        places[new], origins[new] = place, stored
        if now is not None:
            expected[new] = now
    found = names_as_loaded(source.model, expected)
    for new, now in expected.items():
        if plan.dropped and found[new][0] != now and now in source.stored:
            raise CheckpointError(
                f"'{origins[new]}' has a name that says nothing of its place, so that no block can go"
            )
    return Result(source, folder, None, places, origins)


def write(pruner: StreamedUnits, result: Result, progress: Tell) -> None:
    """Cuts the tensors one after another into the files."""
    source, kept = pruner.source, pruner.kept
    names = {stored: name for name, stored in source.stored.items() if name in kept}
    todo = [(new, names[stored]) for new, stored in result.origins.items() if stored in names]
    for done, (new, name) in enumerate(todo, 1):
        result.writer.put(new, sliced(source.read(name), kept[name]))
        progress(f"cut {name}", done, len(todo))


def config_values(source: Source) -> dict[str, Any]:
    """What config.json says of the smaller model."""
    values = deepcopy(source.config)
    for key, value in plan_of(source.model).config.items():
        *path, leaf = key.split(".")
        section = values
        for part in path:
            section = section.setdefault(part, {})
        section[leaf] = value
    return values | {BLOCK: getattr(source.model.config, BLOCK)}


def _after(plan: Plan, name: str) -> str:
    """The name that a tensor of the dense model has once blocks are gone; the inverse of `dense_path`."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        container = ".".join(name.split(".")[:place])
        gone = [path.rpartition(".")[2] for path in plan.dropped if path.rpartition(".")[0] == container]
        if part.isdigit() and gone and all(number.isdigit() for number in gone):
            parts[place] = str(int(part) - sum(int(number) < int(part) for number in gone))
    return ".".join(parts)


def _renumbered(stored: str, name: str, now: str) -> str:
    """The checkpoint's name of a tensor with the numbers in it changed as those in the model's name are."""
    numbers = [part for part in now.split(".") if part.isdigit()]
    given = iter(numbers)
    parts = [next(given, part) if part.isdigit() else part for part in stored.split(".")]
    if sum(part.isdigit() for part in stored.split(".")) != len(numbers):
        raise CheckpointError(f"'{stored}' does not count as '{name}' does, so that no block before it can go")
    return ".".join(parts)
