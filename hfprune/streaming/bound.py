"""Bound: how much memory a streamed pruning takes at most, said before it starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from hfprune.criteria.stacks import Stack
from hfprune.profiling import human_bytes
from hfprune.streaming.source import Source

BUFFER = 1 << 26
"""Bytes for all that is not counted: parts of tensors, the allocator's leftovers, libraries that are opened late."""


@dataclass(frozen=True)
class Bound:
    """The most memory that a streamed pruning takes beside Python and its libraries.

    Attributes:
        what: the largest thing that is held at a time.
        held: its bytes, with what pruning it takes.
        inputs: bytes of the data's hidden states that wait for the next block.
        total: bytes of the whole model.
        storing: bytes for the largest file, where tensors are stored sparse when all are pruned; 0 where they are not.
    """

    what: str
    held: int
    inputs: int
    total: int
    storing: int = 0

    @property
    def peak(self) -> int:
        """Bytes in all."""
        return max(self.held + self.inputs, self.storing) + BUFFER

    def __str__(self) -> str:
        parts = [f"{self.what} {human_bytes(self.held)}"]
        parts += [f"inputs of a block {human_bytes(self.inputs)}"] if self.inputs else []
        if self.storing > self.held + self.inputs:
            parts = [f"a file stored sparse {human_bytes(self.storing)}"]
        parts.append(f"buffer {human_bytes(BUFFER)}")
        return (
            f"peak memory at most {human_bytes(self.peak)} beside the libraries ({', '.join(parts)}); "
            f"the whole model takes {human_bytes(self.total)}"
        )


GRAPH = 3 << 16
"""Bytes a step of a model's graph, with what is found out about it, and with the graph of the cut model beside it."""


@dataclass(frozen=True)
class Seen:
    """What the blocks are given, as the largest batch shows it.

    Attributes:
        batches: how many there are.
        positions: in a batch.
        state: bytes of its hidden states.
        held: bytes of what all blocks are given, and of the first one's input.
        attention: bytes of attention scores, where they are written out.
    """

    batches: int
    positions: int
    state: int
    held: int
    attention: int


def of_storing(source: Source) -> int:
    """Bytes that storing a file sparse takes: its tensors dense and packed, and the work on the largest of them."""
    sizes: dict[Path, int] = {}
    for place in source.places.values():
        sizes[place.path] = sizes.get(place.path, 0) + place.size
    return 2 * max(sizes.values()) + 2 * max(place.size for place in source.places.values())


def of_weights(source: Source, names: Iterable[str], work: int) -> Bound:
    """Where one weight at a time is pruned.

    Args:
        source: the checkpoint.
        names: of the weights.
        work: bytes an element beside the weight as it is and as it will be.
    """

    def needed(name: str) -> int:
        size = source.place(name).size
        elements = source.model.get_parameter(name).numel()
        return 2 * size + work * elements

    largest = max(names, key=needed)
    return Bound(f"'{largest}' and its masks", needed(largest), 0, source.size)


def of_units(source: Source, scored: Iterable[str], steps: int) -> Bound:
    """Where one tensor at a time is scored and cut.

    Args:
        source: the checkpoint.
        scored: names of the parameters that units are scored by.
        steps: of the model's graph.
    """
    scored = list(scored)
    elements = {name: source.model.get_parameter(name).numel() for name in scored}
    needed = {name: source.bytes_of(name) + 16 * elements[name] for name in scored}
    largest = max(needed, key=needed.get, default="")
    return Bound(f"'{largest}', scored or cut, and the graph", needed.get(largest, 0) + GRAPH * steps, 0, source.size)


def of_blocks(source: Source, stacks: list[Stack], outside: int, pruned: set[str], products: bool, seen: Seen) -> Bound:
    """Where one block at a time runs and is pruned.

    Args:
        source: the checkpoint.
        stacks: the blocks.
        outside: bytes of the largest module outside of them.
        pruned: names of the weights that go.
        products: whether sums of products of pairs of inputs are needed.
        seen: what a batch is.
    """
    needed: dict[str, int] = {}
    for stack in stacks:
        for path, block in stack.blocks.items():
            names = [f"{path}.{name}" for name, _ in block.named_parameters()]
            tensors = {name: source.model.get_parameter(name) for name in names}
            weights = [tensor for name, tensor in tensors.items() if name in pruned]
            stored = [source.bytes_of(name) for name in names]
            needed[path] = sum(stored) + max(stored, default=0) + _work(weights, products) + _activations(weights, seen)
    largest = max(needed, key=needed.get, default="")
    inputs = seen.batches * (seen.held + seen.state)
    if not largest or needed[largest] < outside:
        return Bound("the largest module outside of blocks", outside, inputs, source.size)
    return Bound(f"block '{largest}' while it is pruned", needed[largest], inputs, source.size)


def _work(weights: list[torch.Tensor], products: bool) -> int:
    """Bytes for scores and sums: of the largest weight, and of all that may be given the same input."""
    if not weights:
        return 0
    sides: dict[int, int] = {}
    for weight in weights:
        columns = weight[0].numel()
        sides[columns] = sides.get(columns, 0) + 1
    largest = max(weight.numel() for weight in weights)
    if not products:
        return 16 * largest
    return 24 * largest + max(4 * columns**2 * (count + 2) for columns, count in sides.items())


def _activations(weights: list[torch.Tensor], seen: Seen) -> int:
    """Bytes of what a block makes of a batch on its way, and of what its layers see in single precision."""
    sides = sum(weight.shape[0] + weight[0].numel() for weight in weights)
    return 8 * seen.positions * sides + seen.attention
