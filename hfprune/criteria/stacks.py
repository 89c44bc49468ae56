"""Stacks: the blocks of a model that run one after another, found by how data flows, and run again one at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hfprune.criteria.calibration import to_device
from hfprune.errors import ModelError

Forward = Callable[[nn.Module, Any], Any]
FAILURES = (TypeError, RuntimeError, ValueError, LookupError, AttributeError, AssertionError)
DISTURBANCE = 1.5


class Stop(Exception):
    """Ends a forward pass that has shown all that was wanted."""


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor that an earlier block of the stack gives: the block's number, and which of its tensors."""

    block: int
    place: int


@dataclass
class Call:
    """What a block was called with; tensors of earlier blocks stand as slots."""

    args: tuple
    kwargs: dict[str, Any]
    autocast: tuple[bool, torch.dtype] = (False, torch.float32)

    def slots(self) -> list[Slot]:
        """Every slot among the arguments."""
        return [leaf for leaf in leaves((self.args, self.kwargs)) if isinstance(leaf, Slot)]

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor among the arguments that no block of the stack gives."""
        return [leaf for leaf in leaves((self.args, self.kwargs)) if isinstance(leaf, torch.Tensor)]


@dataclass
class Stack:
    """Blocks that run one after another, each on what the one before it gives.

    Attributes:
        path: of the list that holds them.
        blocks: path to module, in the order in which they run.
    """

    path: str
    blocks: dict[str, nn.Module] = field(repr=False)

    @classmethod
    def at(cls, model: nn.Module, path: str) -> Stack:
        """The members of the list at a path, which is empty where the model itself is the list."""
        members = model.get_submodule(path).named_children()
        return cls(path, {f"{path}.{name}" if path else name: child for name, child in members})


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """The value with every leaf of its tuples, lists and maps changed; maps become plain dicts."""
    if isinstance(value, Mapping):
        return {key: mapped(change, part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [mapped(change, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return change(value)


def leaves(value: Any) -> list[Any]:
    """Every leaf of nested tuples, lists and maps, in order."""
    found: list[Any] = []
    mapped(found.append, value)
    return found


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors among the leaves, in order."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, torch.Tensor)]


def forward_of(loss: Forward | None) -> Forward:
    """How a batch goes through the model: as the loss does it, or else whole (a map), without labels (a pair)."""
    if loss is not None:
        return loss

    def forward(model: nn.Module, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return model(**batch)
        inputs = batch[0] if isinstance(batch, list | tuple) else batch
        return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)

    return forward


def run(model: nn.Module, batch: Any, forward: Forward) -> None:
    """One forward pass, which a hook may end by raising `Stop`.

    Raises:
        ModelError: the model can't take the batch.
    """
    # What is loaded only when it runs is on no device now.
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    try:
        forward(model, to_device(batch, device))
    except Stop:
        pass
    except ModelError:
        raise
    except FAILURES as error:
        reason = str(error).strip() or type(error).__name__
        raise ModelError(f"the model can't take the batch: {reason.splitlines()[0]}") from error


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """The model as calibration wants it: evaluating, without gradients, caches or fused paths that call no layer."""
    modes = [(module, module.training) for module in model.modules()]
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    nested = [getattr(c, "get_text_config", lambda **_: None)(decoder=True) for c in configs.values()]
    configs |= {id(c): c for c in nested if c is not None}
    cached = [c for c in configs.values() if getattr(c, "use_cache", False)]
    fused = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    try:
        for config in cached:
            config.use_cache = False
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for config in cached:
            config.use_cache = True
        for module, mode in modes:
            module.training = mode


def find_stacks(model: nn.Module, owners: set[nn.Module], batch: Any, forward: Forward) -> list[Stack]:
    """The stacks of a model: lists of modules (ModuleList, Sequential) whose members each run once, each on a tensor
    that the one before it gave.

    That is seen while one batch runs. A list whose members also take other tensors that come from earlier members, but
    not as they gave them, is none, since those could not be computed again from the blocks alone: a second pass with
    the first member's result disturbed shows which do.

    Args:
        model: in evaluation mode.
        owners: the modules that hold prunable weights; in a stack some member holds two or more.
        batch: any batch that the model takes.
        forward: how it goes through the model.
    """
    found = chained(model, candidates(model, owners), batch, forward)
    return outermost([stack for stack in found if _depends_on_slots_alone(model, stack, batch, forward)])


def candidates(model: nn.Module, owners: set[nn.Module]) -> list[Stack]:
    """The lists of modules that may be stacks: some member holds two or more of the owners."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1:
            counts = [sum(inner in owners for inner in child.modules()) for child in module]
            if max(counts) > 1 and len(set(module)) == len(module):
                found.append(Stack.at(model, path))
    return found


def outermost(found: list[Stack]) -> list[Stack]:
    """Of lists that lie within one another the longest: a stage is made of many blocks, a block of few parts."""
    stacks: list[Stack] = []
    for stack in sorted(found, key=lambda stack: (-len(stack.blocks), stack.path.count("."))):
        if not any(_nested(stack.path, other.path) for other in stacks):
            stacks.append(stack)
    return stacks


def _nested(one: str, other: str) -> bool:
    """Whether one of two paths lies within the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.") or not (one and other)


def chained(model: nn.Module, stacks: list[Stack], batch: Any, forward: Forward) -> list[Stack]:
    """Those of some lists whose members run once each in one chain."""
    calls: dict[nn.Module, int] = {}
    given: dict[nn.Module, list[weakref.ref]] = {}
    linked: set[tuple[nn.Module, nn.Module]] = set()
    before = {
        block: former
        for stack in stacks
        for former, block in zip([*stack.blocks.values()], [*stack.blocks.values()][1:], strict=False)
    }

    def enter(block: nn.Module, args: tuple, kwargs: dict) -> None:
        calls[block] = calls.get(block, 0) + 1
        former = before.get(block)
        if former in given:
            places = [ref() for ref in given[former]]
            if any(tensor is place for tensor in tensors_in((args, kwargs)) for place in places if place is not None):
                linked.add((former, block))

    def leave(block: nn.Module, args: tuple, output: Any) -> None:
        given[block] = [weakref.ref(tensor) for tensor in tensors_in(output)]

    blocks = {block for stack in stacks for block in stack.blocks.values()}
    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(leave) for block in blocks]
    with _removed(handles):
        run(model, batch, forward)
    return [
        stack
        for stack in stacks
        if all(calls.get(block) == 1 for block in stack.blocks.values())
        and all((before[block], block) in linked for block in list(stack.blocks.values())[1:])
    ]


def _depends_on_slots_alone(model: nn.Module, stack: Stack, batch: Any, forward: Forward) -> bool:
    """Whether what the blocks take beside one another's results stays the same when the first one gives another."""

    def disturb(block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        passed = {id(tensor) for tensor in tensors_in((args, kwargs))}
        for tensor in tensors_in(output):
            if tensor.is_floating_point() and id(tensor) not in passed:
                tensor.mul_(DISTURBANCE)  # in place: it stays the tensor that the block gave

    calm = capture(model, stack, batch, forward)
    first = next(iter(stack.blocks.values()))
    with _removed([first.register_forward_hook(disturb, with_kwargs=True)]):
        moved = capture(model, stack, batch, forward)
    return all(
        len(one.tensors()) == len(other.tensors())
        and all(torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True))
        for one, other in zip(calm, moved, strict=True)
    )


def capture(
    model: nn.Module, stack: Stack, batch: Any, forward: Forward, keep: Callable[[Any], Any] = lambda leaf: leaf
) -> list[Call]:
    """What every block of a stack is called with on a batch; the pass ends before the last block runs.

    Args:
        model, stack, batch, forward: as in `find_stacks`.
        keep: what is kept of a leaf, such as a copy in another memory; called once for each.
    """
    calls: list[Call] = []
    given: list[list[weakref.ref]] = []
    kept: dict[int, tuple[Any, Any]] = {}  # by identity, with the leaf itself so that its identity stays its own
    last = list(stack.blocks.values())[-1]

    def hold(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return None if hasattr(leaf, "get_seq_length") else leaf  # a cache would grow at every run
        for number in reversed(range(len(given))):
            for place, reference in enumerate(given[number]):
                if reference() is leaf:
                    return Slot(number, place)
        return kept.setdefault(id(leaf), (leaf, keep(leaf)))[1]

    def enter(block: nn.Module, args: tuple, kwargs: dict) -> None:
        device = next((t.device for t in tensors_in((args, kwargs)) if not t.is_meta), torch.device("cpu")).type
        autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        calls.append(Call(mapped(hold, args), mapped(hold, kwargs), autocast))
        if block is last:
            raise Stop

    def leave(block: nn.Module, args: tuple, output: Any) -> None:
        given.append([weakref.ref(tensor) for tensor in tensors_in(output)])

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in stack.blocks.values()]
    handles += [block.register_forward_hook(leave) for block in stack.blocks.values()]
    with _removed(handles):
        run(model, batch, forward)
    if len(calls) != len(stack.blocks):
        raise ModelError(f"'{stack.path}': its blocks ran {len(calls)} times in a batch, not {len(stack.blocks)}")
    return calls


class Replay:
    """Runs the blocks of a stack one after another over all batches; only what later blocks still need is held.

    Args:
        model, stack, batches, forward: as in `find_stacks`.
        offload: hold what waits for later blocks in the CPU's memory.
    """

    def __init__(self, model: nn.Module, stack: Stack, batches: list[Any], forward: Forward, offload: bool = False):
        self.blocks = list(stack.blocks.values())
        self.keep: Callable[[Any], Any] = (lambda leaf: leaf.cpu()) if offload else (lambda leaf: leaf)
        self.calls = [capture(model, stack, batch, forward, self.keep) for batch in batches]
        self.results: list[dict[Slot, torch.Tensor]] = [{} for _ in batches]

    def run(self, number: int, batch: int, watch: Callable[[list[torch.Tensor]], None] | None = None) -> Any:
        """Runs one block on one batch; a hook may end it by raising `Stop`, then there is no result.

        Args:
            number: of the block.
            batch: of the batch.
            watch: is shown, before the block runs, the tensors that all blocks are given alike.
        """
        call, block = self.calls[batch][number], self.blocks[number]
        alike = {id(tensor) for tensor in self.calls[batch][-1].tensors()} & {id(t) for t in call.tensors()}
        device = next(block.parameters()).device
        moved: dict[int, torch.Tensor] = {}

        def place(leaf: Any) -> Any:
            if isinstance(leaf, Slot):  # copied, since a block may work in place and runs several times
                return self.results[batch][leaf].to(device, copy=True)
            return moved.setdefault(id(leaf), leaf.to(device)) if isinstance(leaf, torch.Tensor) else leaf

        args, kwargs = mapped(place, call.args), mapped(place, call.kwargs)
        if watch is not None:
            watch([tensor for key, tensor in moved.items() if key in alike])
        enabled, dtype = call.autocast
        try:
            with torch.autocast(device.type, dtype=dtype, enabled=enabled):
                return block(*args, **kwargs)
        except Stop:
            return None

    def advance(self, number: int) -> None:
        """Runs a block on every batch for what the later ones take, and lets go of what it took itself."""
        for batch, calls in enumerate(self.calls):
            wanted = {slot for call in calls[number + 1 :] if call is not None for slot in call.slots()}
            if number + 1 < len(self.blocks):
                output = tensors_in(self.run(number, batch))
                made = {Slot(number, place): tensor for place, tensor in enumerate(output)}
                self.results[batch] |= {slot: self.keep(made[slot]) for slot in wanted & made.keys()}
            calls[number] = None
            self.results[batch] = {slot: value for slot, value in self.results[batch].items() if slot in wanted}


@contextmanager
def _removed(handles: list[Any]) -> Iterator[None]:
    """Takes hooks away afterwards."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
