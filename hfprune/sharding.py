"""Tensors sharded over processes (FSDP2): the part of each that lies here, and counts over all parts.

A sharded tensor is a DTensor whose rows are dealt out in order, so that the parts one after another, first process
first, are the tensor as it lies in memory: what is numbered through all parts is numbered as in one process.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from hfprune.errors import ConfigError, HfpruneError, ModelError


class Across:
    """Counts over the processes that hold the parts of a tensor; by default there is one, which holds all.

    All processes call the same methods in the same order.
    """

    alone = True

    def sum(self, counts: torch.Tensor) -> torch.Tensor:
        """The sum over all processes of each of these counts."""
        return counts

    def before(self, counts: torch.Tensor) -> torch.Tensor:
        """The sum of each of these counts over the processes before this one."""
        return torch.zeros_like(counts)

    def agree(self, failure: HfpruneError | None) -> None:
        """Raises in all processes what one of them stumbled over, so that none waits for ever."""
        if failure is not None:
            raise failure

    @contextmanager
    def together(self) -> Iterator[None]:
        """`agree` on what the block raises."""
        failure = None
        try:
            yield
        except HfpruneError as error:
            failure = error
        self.agree(failure)


class AcrossProcesses(Across):
    """Counts over all processes of a group.

    Args:
        device: where the counts are exchanged.
        group: by default that of all processes.
    """

    alone = False

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None = None):
        self.device, self.group = device, group

    def sum(self, counts: torch.Tensor) -> torch.Tensor:
        shared = counts.to(self.device, copy=True)
        dist.all_reduce(shared, group=self.group)
        return shared.to(counts.device)

    def before(self, counts: torch.Tensor) -> torch.Tensor:
        own = counts.to(self.device)
        found = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(found, own, group=self.group)
        rank = dist.get_rank(self.group)
        return torch.stack([torch.zeros_like(own), *found[:rank]]).sum(0).to(counts.device)

    def share(self, total: int) -> tuple[int, int]:
        """Where the share of this process begins and ends of so many things that are dealt out evenly."""
        rank, count = dist.get_rank(self.group), dist.get_world_size(self.group)
        return rank * total // count, (rank + 1) * total // count

    def joined(self, part: torch.Tensor, total: int) -> torch.Tensor:
        """All shares of so many flags, one after another."""
        longest = -(-total // dist.get_world_size(self.group))
        own = torch.nn.functional.pad(part.to(self.device, torch.uint8), (0, longest - len(part)))
        found = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(found, own, group=self.group)
        count = len(found)
        sizes = [(rank + 1) * total // count - rank * total // count for rank in range(count)]
        return torch.cat([full[:size] for full, size in zip(found, sizes, strict=True)]).bool().to(part.device)

    def agree(self, failure: HfpruneError | None) -> None:
        failed = self.sum(torch.tensor([int(failure is not None)]))
        if failure is not None:
            raise failure
        if failed:
            raise ModelError("another process could not do its part; nothing was changed")


ALONE = Across()


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor's parts lie in several processes."""
    # Slow to import, and there are none where nothing has imported it.
    library = sys.modules.get("torch.distributed.tensor")
    return library is not None and isinstance(tensor, library.DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that lies here, in the same memory; all of it where it is not sharded."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, gathered where it is sharded; every process gets it, and all of them call this."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor


def part_of(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The part of a whole tensor that lies here when it is sharded like another one; nothing is exchanged."""
    if not is_sharded(like):
        return full
    # Needed for sharded tensors alone, and slow to import.
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()


def joined(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The whole of which every process holds a part, sharded like another tensor; all of them call this."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    held = part.to(local(like).device)
    held = held.view(torch.uint8) if part.dtype == torch.bool else held
    given = {"shape": like.shape, "stride": _row_major(like.shape), "run_check": False}
    full = DTensor.from_local(held.contiguous(), like.device_mesh, like.placements, **given).full_tensor()
    return full.view(torch.bool) if part.dtype == torch.bool else full


def reshard(model: nn.Module) -> None:
    """Every parameter as its part again: a forward pass without a backward one leaves some of them whole."""
    library = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if library is not None else ():
        if isinstance(module, library.FSDPModule):
            module.reshard()


@torch.no_grad()
def put_back(model: nn.Module, parts: Mapping[str, torch.Tensor]) -> None:
    """Copies parts, such as those of an earlier state, into a sharded model's own."""
    reshard(model)
    for name, value in model.state_dict().items():
        local(value).copy_(parts[name])


def check_rows(name: str, tensor: torch.Tensor) -> None:
    """Refuses a tensor whose rows are not dealt out in order over all processes.

    Raises:
        ConfigError: one line that says how it is sharded.
    """
    placements = [str(placement) for placement in tensor.placements] if is_sharded(tensor) else ["S(0)"]
    if placements != ["S(0)"]:
        raise ConfigError(
            f"pruning: '{name}' is sharded as {', '.join(placements)}; masks can follow FSDP2 over all processes, "
            f"without replicas or tensor parallelism"
        )


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides)) if len(shape) else ()
