"""Torch-Pruning on the same models, where it is installed; it gets no model-specific help."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from structure_rows import Row, outputs_of, timm_model
from torch import nn

from hfprune.profiling import example_batch


def classifier_of(model: nn.Module) -> list[nn.Module]:
    """The layers that give the answer: the last linear layer."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return layers[-1:]


def peer_pruner(model: nn.Module, inputs: Any, output: Callable | None = None) -> Any:
    """Its MetaPruner at half of all channels by magnitude, the classifier kept."""
    import torch_pruning

    return torch_pruning.pruner.MetaPruner(
        model, inputs, importance=torch_pruning.importance.MagnitudeImportance(), pruning_ratio=0.5,
        ignored_layers=classifier_of(model), output_transform=output,
    )  # fmt: skip


def timm_peer_row(name: str) -> Row:
    """Whether it prunes, and a forward pass runs on the result."""
    model = timm_model(name)
    inputs, _ = example_batch(model)
    before = sum(p.numel() for p in model.parameters())
    began = time.perf_counter()
    peer_pruner(model, inputs[0]).step()
    row = Row(cells={"seconds": f"{time.perf_counter() - began:.1f}"})
    outputs_of(model, inputs)
    after = sum(p.numel() for p in model.parameters())
    row.cells["left"] = f"{after / before:.0%}"
    if after == before:
        row.fail("nothing was pruned")
    return row
