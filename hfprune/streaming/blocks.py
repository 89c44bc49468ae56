"""Wanda and SparseGPT from files to files: one block has its values at a time, and is written once it is pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hfprune.criteria.calibration import to_device
from hfprune.criteria.stacks import Call, Replay, Stack, candidates, capture, chained, outermost, tensors_in
from hfprune.criteria.visit import Visit
from hfprune.errors import DataError, ModelError
from hfprune.originals import Originals
from hfprune.streaming.bound import Bound, Seen, of_blocks
from hfprune.streaming.residence import Residence, shapes_only
from hfprune.streaming.result import Result
from hfprune.streaming.shards import read
from hfprune.streaming.source import Source

NO_WAY = "this model can't be streamed block by block: prune it in memory, or use l1"


class Unchanged(Originals):
    """Keeps nothing: the files that are read stay as they are."""

    def keep(self, parameter: nn.Parameter) -> None:
        pass


class StreamedVisit(Visit):
    """A Visit whose model has values only in the block that is at work.

    Which lists are stacks, and what their blocks are called with, is seen in runs in which the blocks compute shapes
    alone: so a tensor without values among a block's arguments is one that depends on other blocks.

    Args:
        args: as for Visit.
        result: takes the pruned weights.
        tell: is told how much memory it takes before anything is pruned.
    """

    def __init__(self, *args: Any, result: Result, tell: Callable[[Bound], None]):
        super().__init__(*args)
        self.result, self.tell = result, tell
        self.lists: list[Stack] = []
        self.source: Source = result.source
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.residence = Residence(self.model, self._values, device)
        _without_labels(self.model, self.batches[0])  # it may be refused
        plain = self.forward

        def forward(model: nn.Module, batch: Any) -> Any:
            return plain(model, to_device(_without_labels(model, batch), device))

        self.forward = forward

    def stacks(self) -> list[Stack]:
        owners = {layer.module for group in self.layers.values() for layer in group}
        lists = candidates(self.model, owners)
        with self._shapes_only(lists):
            self.lists = chained(self.model, lists, self.batches[0], self.forward)
        calls = {stack.path: self._calls(stack) for stack in self.lists}
        found = outermost([stack for stack in self.lists if _has_values(calls[stack.path])])
        inside, listed = self._inside(found), self._inside(lists)
        lost = next((name for name in self.layers if name in listed and name not in inside), None)
        if lost is not None:
            raise ModelError(f"'{lost}' lies in no block that can be run by itself; {NO_WAY}")
        self.tell(self._bound(found, [calls[stack.path] for stack in found]))
        return found

    def replay(self, stack: Stack) -> Replay:
        with self._shapes_only([stack]):
            return super().replay(stack)

    def run_first(self) -> None:
        with self._shapes_only(self.lists):
            super().run_first()

    def run_model(self, batch: int) -> None:
        with self.residence.on_demand():
            super().run_model(batch)

    @contextmanager
    def at_hand(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        modules = list(modules)
        inner = {module for outer in modules for module in outer.modules()}
        with self.residence.at_hand(modules):
            yield
            for name, layers in self.layers.items():
                if layers[0].module in inner:
                    self.result.put_masked(name, layers[0].module.weight.detach())

    def note(self, name: str, kept: torch.Tensor) -> None:
        pass  # written with the weight

    @contextmanager
    def _shapes_only(self, stacks: list[Stack]) -> Iterator[None]:
        """Modules run with their values, but for the blocks of some stacks, which compute shapes alone."""
        blocks = [block for stack in stacks for block in stack.blocks.values()]
        try:
            with self.residence.on_demand(), shapes_only(blocks):
                yield
        except ModelError as error:
            raise ModelError(f"{error}; or, if the model takes it in memory, {NO_WAY}") from error

    def _calls(self, stack: Stack) -> list[Call]:
        with self._shapes_only([stack]):
            return capture(self.model, stack, self.batches[0], self.forward)

    def _values(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Tensors of the model: pruned ones from the files that are written, the others from the dense checkpoint."""
        done = {name: self.source.stored[name] for name in names if self.source.stored.get(name) in self.result.records}
        places = self.result.writer.places
        rest = self.source.read_some(name for name in names if name not in done)
        return rest | {name: read(places[stored], stored) for name, stored in done.items()}

    def _bound(self, stacks: list[Stack], calls: list[list[Call]]) -> Bound:
        """The most memory that is taken."""
        inside = {module for stack in stacks for block in stack.blocks.values() for module in block.modules()}
        outside = [self.residence.names([m]) for m in self.model.modules() if m not in inside and not [*m.children()]]
        largest = max((sum(map(self.source.bytes_of, names)) for names in outside), default=0)
        seen = [_seen(found, self.batches, self.model) for found in calls]
        widest = max(seen, key=lambda one: one.state + one.held, default=Seen(len(self.batches), 0, 0, 0, 0))
        return of_blocks(self.source, stacks, largest, set(self.layers), self.criterion.products, widest)


def _seen(calls: list[Call], batches: list[Any], model: nn.Module) -> Seen:
    """What the blocks of a stack are given; calls are those of the first batch."""
    tensors = {id(tensor): tensor for call in calls for tensor in call.tensors()}
    states = max((t for t in calls[0].tensors() if t.is_floating_point()), key=torch.Tensor.numel)
    sizes = [max(tensor.numel() for tensor in tensors_in(batch)) for batch in batches]
    more = max(sizes) / sizes[0]
    channels = states.shape[1 if states.ndim == 4 else -1]
    positions = int(states.numel() // channels * more)
    attention = 0
    if getattr(model.config, "_attn_implementation", "") == "eager" and states.ndim == 3:
        heads = getattr(model.config.get_text_config(), "num_attention_heads", 1)
        attention = int(4 * 3 * heads * positions * states.shape[1] * more)
    held = sum(tensor.nbytes for tensor in tensors.values())
    return Seen(len(batches), positions, int(states.nbytes * more), int(held * more), attention)


def _has_values(calls: list[Call]) -> bool:
    """Whether nothing that blocks are given depends on other blocks, but for what these themselves give."""
    return not any(tensor.is_meta for call in calls for tensor in call.tensors())


def _without_labels(model: nn.Module, batch: Any) -> Any:
    """A batch by which no loss is computed; a decoder gets what it would have made of the labels."""
    if not isinstance(batch, Mapping) or "labels" not in batch:
        return batch
    given = {key: value for key, value in batch.items() if key != "labels"}
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" not in given:
        prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if prepare is None:
            raise DataError(f"data: {type(model).__name__} makes no inputs of its decoder from labels alone; give "
                            f"decoder_input_ids")  # fmt: skip
        given["decoder_input_ids"] = prepare(labels=batch["labels"])
    return given
