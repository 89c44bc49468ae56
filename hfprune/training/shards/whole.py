"""Whole tensors of a sharded model: gathered one after another into a file, so that no process holds the model."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from hfprune.errors import CheckpointError
from hfprune.sharding import AcrossProcesses, is_sharded, joined, local, reshard, whole

_ALIGNED = 64


class TensorFile:
    """Tensors in a file without a name, which goes with the object; they are read when they are used."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed by `close`)
        self._end = 0

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as it lies in the file, on the CPU."""
        values = tensor.detach().cpu().contiguous()
        if not values.numel():
            return values
        raw = values.reshape(-1).view(torch.uint8).numpy()
        start = -(-self._end // _ALIGNED) * _ALIGNED
        self._file.seek(start)
        self._file.write(raw.data)
        self._file.flush()
        self._end = start + len(raw)
        mapped = np.memmap(self._file, dtype=np.uint8, mode="c", offset=start, shape=raw.shape)
        return torch.from_numpy(mapped).view(values.dtype).view(values.shape)

    def close(self) -> None:
        """Lets the file go; what is mapped stays readable."""
        self._file.close()


def skeleton_of(model: nn.Module, *, share_config: bool = True) -> nn.Module:
    """A copy of a model whose parameters have shapes and no values, with the model's own config or a copy of it."""
    return copied(model, {id(parameter): _empty(parameter) for parameter in model.parameters()}, share_config)


def copied(model: nn.Module, parameters: Mapping[int, nn.Parameter], share_config: bool = True) -> nn.Module:
    """A copy of a model with others in the place of its parameters, with the model's own config or a copy of it."""
    memo: dict[int, object] = dict(parameters)
    if share_config:  # parts of a model may hold parts of its config
        configs = [module.config for module in model.modules() if getattr(module, "config", None) is not None]
        memo |= {id(config): config for config in configs}
    return copy.deepcopy(model, memo)


def _empty(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)


def fill(skeleton: nn.Module, model: nn.Module, across: AcrossProcesses, keep: bool, folder: Path) -> None:
    """Gives a skeleton the values of a model, in the processes that `keep` them, where they are mapped from a file.

    All processes take part.

    Args:
        skeleton: its parameters are replaced.
        model: sharded, or whole.
        across: the processes.
        keep: whether this one gets the values.
        folder: where there is room for them.

    Raises:
        CheckpointError: there is none.
    """
    reshard(model)
    named = dict(model.named_parameters())
    with gathering(across, keep, folder) as add:
        found = {name: add(whole(parameter)) for name, parameter in named.items()}
    if not keep:
        return
    buffers = dict(model.named_buffers())
    for name, buffer in skeleton.named_buffers():
        buffer.copy_(local(buffers[name]))
    full = {name: nn.Parameter(found[name], requires_grad=named[name].requires_grad) for name in found}
    replace(skeleton, {id(before): full[name] for name, before in skeleton.named_parameters()})


def empty_out(skeleton: nn.Module) -> None:
    """Leaves a skeleton without values."""
    replace(skeleton, {id(parameter): _empty(parameter) for parameter in skeleton.parameters()})


@contextmanager
def filled(skeleton: nn.Module, model: nn.Module, across: AcrossProcesses, keep: bool, folder: Path) -> Iterator[None]:
    """`fill` for a while; afterwards the skeleton is without values again."""
    fill(skeleton, model, across, keep, folder)
    try:
        yield
    finally:
        empty_out(skeleton)


def replace(model: nn.Module, parameters: Mapping[int, nn.Parameter]) -> None:
    """Puts others in the place of a model's parameters, wherever modules share them."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = parameters[id(parameter)]


@contextmanager
def gathering(
    across: AcrossProcesses, keep: bool, folder: Path
) -> Iterator[Callable[[torch.Tensor], torch.Tensor | None]]:
    """What takes whole tensors into a file, in the processes that `keep` them; None in the others.

    A full disk in one process is an error in all of them once all tensors have been gathered.
    """
    failure: CheckpointError | None = None
    file = None

    def add(tensor: torch.Tensor) -> torch.Tensor | None:
        nonlocal failure, file
        if not keep or failure is not None:
            return None
        try:
            file = file or TensorFile(folder)
            return file.add(tensor)
        except OSError as error:
            failure = CheckpointError(f"no room in '{folder}' for the gathered tensors: {error.strerror}")
            return None

    try:
        yield add
    finally:
        if file is not None:
            file.close()
    across.agree(failure)


def gathered(
    parts: Mapping[str, torch.Tensor],
    like: Mapping[str, torch.Tensor],
    across: AcrossProcesses,
    keep: bool,
    folder: Path,
) -> dict[str, torch.Tensor]:
    """The whole tensors of which every process holds parts, by name, in the processes that `keep` them.

    Args:
        parts: what lies here.
        like: tensors of the same names, which are sharded in the same way.
        across, keep, folder: as in `filled`.
    """
    with gathering(across, keep, folder) as add:
        found = {name: add(joined(part, like[name])) for name, part in parts.items()}
    return found if keep else {}


def dealt_out(tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """The part that lies here of a tensor that the first process deals out; the others need not have it."""
    full = torch.empty(like.shape, dtype=like.dtype) if tensor is None else tensor.to(like.dtype)
    if not is_sharded(like):
        full = full.to(like.device)
        dist.broadcast(full, src=0)
        return full
    # Needed for sharded tensors alone, and slow to import.
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, like.device_mesh, like.placements).to_local()
