"""Calibration: batches run through the model to feed data-driven criteria; sums are reduced over all processes."""

from hfprune.criteria.calibration.batches import (
    LossFunction,
    batches_of,
    default_loss,
    example_inputs_of,
    loss_from,
    run_forward,
    to_device,
)
from hfprune.criteria.calibration.gather import gather
from hfprune.criteria.calibration.gradients import mean_gradients
from hfprune.criteria.calibration.running import Calibration, Progress

__all__ = [
    "Calibration",
    "LossFunction",
    "Progress",
    "batches_of",
    "default_loss",
    "example_inputs_of",
    "gather",
    "loss_from",
    "mean_gradients",
    "run_forward",
    "to_device",
]
