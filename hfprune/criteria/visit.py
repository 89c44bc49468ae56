"""visit(): prunes a model's layers in the order in which they run, each on what the pruned ones before it give."""

from __future__ import annotations

import itertools
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from torch import nn

from hfprune.bits import PackedTensors
from hfprune.criteria.calibration import batches_of
from hfprune.criteria.complaints import blaming
from hfprune.criteria.layers import Layer, layers_of, seen_by
from hfprune.criteria.layerwise import Goal, Layerwise, all_finite
from hfprune.criteria.stacks import Forward, Replay, Stack, Stop, find_stacks, forward_of, run, still
from hfprune.criteria.tokens import Tokens
from hfprune.errors import ConfigError, DataError, ModelError
from hfprune.masks import MaskSet
from hfprune.originals import Originals
from hfprune.weights import Weight

HEARTBEAT = 30.0
"""Seconds after which a log without a terminal gets a line."""


def visit(
    criterion: Layerwise,
    name: str,
    model: nn.Module,
    weights: dict[str, Weight],
    goals: dict[str, Goal],
    masks: MaskSet,
    data: Any,
    originals: Originals,
    loss: Forward | None = None,
    kind: Callable[..., Visit] | None = None,
) -> PackedTensors:
    """Prunes layers in the order in which they run; the model's weights change, and `originals` holds what they were.

    The blocks of a model are found by structure (`find_stacks`). A block's inputs are kept for one block at a time, and
    within it layers that take the same tensor are pruned together, from what the layers before them give by then.
    Layers outside of such blocks are each pruned from a run of the whole model. A position that `attention_mask` calls
    padding counts nowhere. The sums are those of all processes together.

    Args:
        criterion: prunes one layer.
        name: the criterion's, for messages.
        model: any module.
        weights, goals: what is pruned and how much of it, by weight name.
        masks: what is gone already.
        data: a batch or an iterable of batches; `criterion.batches` of them are used.
        originals: takes each weight before it changes.
        loss: how a batch goes through the model, where it is not simply called with it.
        kind: what makes the `Visit`.

    Returns:
        What is kept now, by weight name, in the weight's shape.

    Raises:
        ConfigError: there is no data, or a weight whose inputs can't be seen.
        DataError: the data holds no batch.
        ModelError: the model can't take a batch, or inputs that are not finite.
    """
    layers = layers_of(model, weights, name)
    if data is None:
        raise ConfigError(f"pruning.criterion: '{name}' looks at the inputs of layers and needs data; or use 'l1'")
    batches = list(itertools.islice(batches_of(data), criterion.batches))
    if not batches:
        raise DataError("the calibration data holds no batch")
    run_of = (kind or Visit)(criterion, model, layers, goals, masks, batches, forward_of(loss), originals)
    with still(model), blaming(name):
        run_of.through()
    return run_of.kept


@dataclass
class _Sums:
    """What the layers of one weight saw so far."""

    products: bool
    total: torch.Tensor | None = None
    count: int = 0

    def add(self, rows: torch.Tensor) -> None:
        """Adds (groups, positions, columns)."""
        if self.total is None:
            groups, _, columns = rows.shape
            self.total = rows.new_zeros((groups, columns, columns) if self.products else (groups, columns))
        if self.products:
            self.total.baddbmm_(rows.transpose(1, 2), rows)
        else:
            self.total += rows.square().sum(1)
        self.count += rows.shape[1]


@dataclass
class _Order:
    """The order in which weights are first used: `groups` of those whose layers take the same tensor (or a mark alone),
    and how often each is used."""

    groups: list[list[str]] = field(default_factory=list)
    uses: dict[str, int] = field(default_factory=dict)


class Visit:
    """One pass over a model whose weights lie in memory; `streaming` has one for those that lie in files.

    Args:
        criterion, model, goals, masks, originals: as for `visit`.
        layers: the layers of every weight, by weight name.
        batches: those that are used.
        forward: how a batch goes through the model.
    """

    def __init__(
        self,
        criterion: Layerwise,
        model: nn.Module,
        layers: dict[str, list[Layer]],
        goals: dict[str, Goal],
        masks: MaskSet,
        batches: list[Any],
        forward: Forward,
        originals: Originals,
    ):
        self.criterion, self.model, self.layers, self.goals = criterion, model, layers, goals
        self.masks, self.batches, self.forward, self.originals = masks, batches, forward, originals
        self.kept = PackedTensors()
        self.tokens = [Tokens(model, batch) for batch in batches]

    def stacks(self) -> list[Stack]:
        """The model's stacks."""
        owners = {layer.module for group in self.layers.values() for layer in group}
        return find_stacks(self.model, owners, self.batches[0], self.forward)

    def replay(self, stack: Stack) -> Replay:
        """What the blocks of a stack are called with."""
        return Replay(self.model, stack, self.batches, self.forward, self.criterion.offload)

    def run_first(self) -> None:
        """One run of the whole model, in which it is seen what runs when."""
        run(self.model, self.batches[0], self.forward)

    def run_model(self, batch: int) -> None:
        """One run of the whole model on a batch."""
        run(self.model, self.batches[batch], self.forward)

    def at_hand(self, modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
        """The values of some modules are there, to be used and changed, for the time of the block."""
        return nullcontext()

    def note(self, name: str, kept: torch.Tensor) -> None:
        """Takes down what is kept of a weight that has been pruned."""
        self.kept[name] = kept

    def through(self) -> None:
        """Prunes everything."""
        stacks = {path: Stack.at(self.model, path) for path in _agreed([stack.path for stack in self.stacks()])}
        inside = self._inside(stacks.values())
        loose = [name for name in self.layers if name not in inside]
        marks = {next(iter(stack.blocks.values())): path for path, stack in stacks.items()}
        order = self._order(loose, self.run_first, marks)
        with _shown(sum(len(stack.blocks) for stack in stacks.values()) + len(order.groups) - len(stacks)) as step:
            for group in order.groups:
                if group[0] in stacks:
                    self._through_stack(stacks[group[0]], inside, step)
                else:
                    with self.at_hand(layer.module for name in group for layer in self.layers[name]):
                        self._prune_group(group, order.uses, lambda batch, watch: self.run_model(batch))
                    step(", ".join(group[:1]))

    def _inside(self, stacks: Iterable[Stack]) -> dict[str, str]:
        """Weight name to the path of the one block that holds all its layers."""
        found = {}
        for stack in stacks:
            for path, block in stack.blocks.items():
                held = set(block.modules())
                for name, layers in self.layers.items():
                    if all(layer.module in held for layer in layers):
                        found[name] = path
        return found

    def _through_stack(self, stack: Stack, inside: dict[str, str], step: Callable[[str], None]) -> None:
        replay = self.replay(stack)
        held = [[name for name in self.layers if inside.get(name) == path] for path in stack.blocks]
        for number, (path, names) in enumerate(zip(stack.blocks, held, strict=True)):
            with self.at_hand([stack.blocks[path]]):
                if names:
                    order = self._order(names, lambda number=number: replay.run(number, 0))
                    for group in order.groups:
                        self._prune_group(
                            group, order.uses, lambda batch, watch, number=number: replay.run(number, batch, watch)
                        )
                if any(held[number + 1 :]):
                    replay.advance(number)
            step(path)
            if not any(held[number + 1 :]):
                break

    def _order(self, names: list[str], go: Callable[[], Any], marks: Mapping[nn.Module, str] | None = None) -> _Order:
        """Sees in one run in which order layers are used; a module with a mark stands in it by that alone."""
        found = _Order()
        inputs: list[tuple[weakref.ref, list[str]]] = []

        def use(name: str, seen: torch.Tensor) -> None:
            found.uses[name] = found.uses.get(name, 0) + 1
            if found.uses[name] > 1:
                return
            for reference, group in inputs:
                if reference() is seen:
                    group.append(name)
                    return
            found.groups.append([name])
            inputs.append((weakref.ref(seen), found.groups[-1]))

        def mark(path: str) -> None:
            if [path] not in found.groups:
                found.groups.append([path])

        handles = [
            module.register_forward_pre_hook(lambda *_, path=path: mark(path)) for module, path in (marks or {}).items()
        ]
        for name in names:
            for layer in self.layers[name]:
                handles.append(
                    layer.module.register_forward_pre_hook(
                        lambda module, args, kwargs, name=name: use(name, seen_by(args, kwargs)), with_kwargs=True
                    )
                )
        try:
            go()
        finally:
            for handle in handles:
                handle.remove()
        # Used more than once, a weight is pruned alone, by what all its uses see.
        again = [name for name in names if found.uses.get(name, 0) > 1]
        groups = [part for group in found.groups for part in _parted(group, again)]
        idle = [name for name in names if name not in found.uses]
        found.groups, found.uses = _agreed((groups + ([idle] if idle else []), found.uses))
        return found

    def _prune_group(
        self, group: list[str], uses: dict[str, int], go: Callable[[int, Callable[[list[torch.Tensor]], None]], Any]
    ) -> None:
        """Sums up what the layers of some weights see on all batches, then prunes these weights."""
        sums = {name: _Sums(self.criterion.products) for name in group}
        ends = all(uses.get(name) == 1 for name in group)
        state: dict[str, Any] = {"batch": 0, "shared": (), "seen": set()}

        def see(layer: Layer, args: tuple, kwargs: dict) -> None:
            seen = seen_by(args, kwargs)
            shared = any(seen is tensor for tensor in state["shared"])
            real = self.tokens[state["batch"]].real(layer, seen, shared)
            sums[layer.name].add(layer.rows(real))
            state["seen"].add(layer.name)
            if ends and len(state["seen"]) == len(group):
                raise Stop

        def watch(alike: list[torch.Tensor]) -> None:
            state["shared"] = alike

        handles = [
            layer.module.register_forward_pre_hook(
                lambda module, args, kwargs, layer=layer: see(layer, args, kwargs), with_kwargs=True
            )
            for name in group
            for layer in self.layers[name]
        ]
        try:
            for batch in range(len(self.batches)):
                state |= {"batch": batch, "shared": (), "seen": set()}
                go(batch, watch)
        finally:
            for handle in handles:
                handle.remove()
        for name in group:
            self._prune(self.layers[name][0], sums.pop(name))

    def _prune(self, layer: Layer, sums: _Sums) -> None:
        parameter, name = layer.module.weight, layer.name
        values = parameter.detach()
        matrices = layer.to_matrices(values.to(torch.promote_types(values.dtype, torch.float32)))
        mean = _mean(sums, matrices)
        criterion = f"pruning.criterion: '{self.criterion.name}'"
        if mean is None:
            raise ModelError(f"{criterion} can't score '{name}': it took no part in any calibration batch; "
                             f"name it in `ignore`, or give batches that reach it")  # fmt: skip
        if not all_finite(mean) or not all_finite(matrices):
            raise ModelError(f"{criterion} can't score '{name}': it, or what it is given, is not finite")
        before = self.masks.gone(name)
        before = None if before is None else layer.to_matrices(before)
        gone, values = self.criterion.prune_layer(layer, matrices, mean, before, self.goals[name])
        self.originals.keep(parameter)
        gone = layer.from_matrices(gone)
        if self.criterion.updates:
            parameter.copy_(layer.from_matrices(values))
        parameter.masked_fill_(gone, 0.0)
        self.note(name, ~gone)


def _mean(sums: _Sums, matrices: torch.Tensor) -> torch.Tensor | None:
    """The mean over all positions of all processes; None where nothing was seen."""
    groups, _, columns = matrices.shape
    shape = (groups, columns, columns) if sums.products else (groups, columns)
    total = torch.zeros(shape, dtype=matrices.dtype, device=matrices.device) if sums.total is None else sums.total
    total, count = total.to(matrices.device, matrices.dtype), torch.tensor(float(sums.count), device=matrices.device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
        dist.all_reduce(count)
    return total.div_(count) if count else None


def _parted(group: list[str], again: list[str]) -> Iterator[list[str]]:
    """A group without those of its names that are to stand alone, then each of these."""
    once = [name for name in group if name not in again]
    if once:
        yield once
    yield from ([name] for name in group if name in again)


def _agreed(value: Any) -> Any:
    """What the first process has: what is added up in several processes is added up in the same order in all."""
    if dist.is_available() and dist.is_initialized():
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]
    return value


@contextmanager
def _shown(total: int) -> Iterator[Callable[[str], None]]:
    """Progress a block: a bar in a terminal, a line now and then in a log."""
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        yield lambda path: None
        return
    console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    done, said = 0, time.monotonic()

    def line(path: str) -> None:
        nonlocal done, said
        done += 1
        if time.monotonic() - said > HEARTBEAT:
            said = time.monotonic()
            console.print(f"pruned {done} of {total}: {path}", markup=False)

    if not console.is_terminal:
        yield line
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("pruning", total=total)
        yield lambda path: bar.update(task, advance=1, description=f"pruned {path}")
