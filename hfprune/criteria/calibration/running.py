"""Running a model over calibration batches: what is left untouched, and how sums become those of all processes."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hfprune.criteria.calibration.batches import LossFunction, batches_of, default_loss, run_forward, to_device
from hfprune.errors import DataError, HfpruneError, ModelError
from hfprune.weights import Weight

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
"""Wraps an iterable to show how far it is, as `rich.progress.track` does: from it and a description to its items."""


@dataclass(frozen=True)
class Calibration:
    """What statistics are gathered from.

    Attributes:
        model: run in evaluation mode; left as it was.
        weights: those that statistics are wanted for.
        data: a batch or an iterable of batches (`batches_of`).
        batches: how many of them are used, in every process.
        loss: from the model and a batch to a scalar; None stands for the model's own (`default_loss`).
        progress: shows how far the batches are.
        seed: of what is drawn.
        example_inputs: positional and keyword arguments of one forward pass, for what needs no data.
    """

    model: nn.Module
    weights: dict[str, Weight]
    data: Any = None
    batches: int = 8
    loss: LossFunction | None = None
    progress: Progress | None = None
    seed: int = 0
    example_inputs: tuple[tuple, dict[str, Any]] | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weights' parameters."""
        return [weight.parameter for weight in self.weights.values()]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.parameters[0].device

    def visit(self, words: str) -> Iterator[tuple[int, Any]]:
        """Batches on the model's device, each with its number, counted from 1."""
        batches: Iterable[Any] = itertools.islice(batches_of(self.data), self.batches)
        if self.progress is not None:
            batches = self.progress(batches, words)
        for number, batch in enumerate(batches, start=1):
            yield number, to_device(batch, self.device)

    def loss_on(self, batch: Any, number: int) -> torch.Tensor:
        """The loss on a batch, one finite number that a gradient can be taken of.

        Raises:
            ModelError: it is none, or the model can't take the batch.
        """
        loss = (self.loss or default_loss)(self.model, batch)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ModelError(f"the loss on calibration batch {number} must be one number that depends on the weights")
        if not torch.isfinite(loss):
            raise ModelError(f"the loss on calibration batch {number} is {loss.item()}; nothing was pruned")
        return loss.reshape(())

    def forward(self, batch: Any) -> None:
        """A forward pass; through a loss that was given, since it alone knows how the model takes such a batch."""
        if self.loss is None:
            run_forward(self.model, batch)
        else:
            self.loss(self.model, batch)


def zeros(shape: Iterable[int], like: torch.Tensor) -> torch.Tensor:
    """Where sums are kept: at least single precision, on the device of `like`."""
    dtype = torch.promote_types(like.dtype, torch.float32) if like.is_floating_point() else torch.float32
    return torch.zeros(tuple(shape), dtype=dtype, device=like.device)


def accumulate(
    calibration: Calibration,
    words: str,
    add: Callable[[Any, int], int],
    sums: Iterable[torch.Tensor],
    largest: Iterable[torch.Tensor] = (),
) -> int:
    """Runs `add` on every batch, then adds `sums` up over all processes, and takes the maximum of `largest`.

    A failure in one process is one in all of them, so that none waits for ever.

    Args:
        add: from a batch and its number to what it counts for.

    Returns:
        The sum of what `add` gave.

    Raises:
        DataError: there was no batch anywhere.
        HfpruneError: what `add` raised, here or in another process.
    """
    counted, failure = 0, None
    try:
        for number, batch in calibration.visit(words):
            counted += add(batch, number)
    except HfpruneError as error:
        failure = error
    if dist.is_available() and dist.is_initialized():
        shared = torch.tensor([float(counted), float(failure is not None)], device=calibration.device)
        dist.all_reduce(shared)
        counted = int(shared[0])
        if shared[1] and failure is None:
            failure = ModelError("another process could not run its calibration batches; nothing was pruned")
        if failure is None:
            for tensor in sums:
                dist.all_reduce(tensor)
            for tensor in largest:
                dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    if failure is not None:
        raise failure
    if not counted:
        raise DataError("the calibration data holds no batch")
    return counted


@contextmanager
def differentiable(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """The model in evaluation mode with gradients for the parameters; all is put back afterwards."""
    frozen = [p for p in parameters if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with evaluated(model), torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; every module's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Only kernels whose backward pass can itself be differentiated: fused attention and fused recurrence can't."""
    with ExitStack() as stack:
        stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a device that is not there
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        yield
