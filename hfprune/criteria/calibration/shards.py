"""Gradients of a model that FSDP2 shards: of every weight the part that lies here."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from hfprune.criteria.calibration.batches import batches_of, to_device
from hfprune.criteria.calibration.running import Calibration, differentiable
from hfprune.errors import DataError, HfpruneError
from hfprune.sharding import AcrossProcesses, local, reshard


def sharded_gradient(calibration: Calibration) -> dict[str, torch.Tensor]:
    """The gradient of the loss, averaged over batches and all processes; weights that took no part are left out.

    The backward pass of a sharded model leaves every process the mean over all of them for its own rows. As all
    processes must run through the model together, none runs a batch that another has not.
    """
    model, across = calibration.model, AcrossProcesses(calibration.device)
    batches = itertools.islice(batches_of(calibration.data), calibration.batches)
    model.zero_grad(set_to_none=True)
    seen = 0
    try:
        with differentiable(model, calibration.parameters):
            for number in itertools.count(1):
                batch: Any = next(batches, None)
                if across.sum(torch.tensor([int(batch is None)])):
                    break
                loss = _loss(calibration, to_device(batch, calibration.device), number, across)
                loss.backward()
                seen += 1
        if not seen:
            raise DataError("the calibration data holds no batch")
        reshard(model)
        gradients = {name: weight.parameter.grad for name, weight in calibration.weights.items()}
        # A part without rows may have no gradient: whether a weight took part is known by all processes together.
        took_part = across.sum(torch.tensor([int(value is not None) for value in gradients.values()])).tolist()
        return {
            name: local(value).to(torch.promote_types(value.dtype, torch.float32)) / seen
            for (name, value), count in zip(gradients.items(), took_part, strict=True)
            if count and value is not None
        }
    finally:
        model.zero_grad(set_to_none=True)


def _loss(calibration: Calibration, batch: Any, number: int, across: AcrossProcesses) -> torch.Tensor:
    """The loss on a batch; where it is none in one process, all of them stop."""
    loss, failure = None, None
    try:
        loss = calibration.loss_on(batch, number)
    except HfpruneError as error:
        failure = error
    across.agree(failure)
    return loss
