"""A family of sizes from one run: every step of `export_sizes` leaves a checkpoint of its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from hfprune.checkpoint.load import from_pretrained
from hfprune.checkpoint.save import save_pretrained
from hfprune.checkpoint.tensors import bytes_on_disk
from hfprune.profiling import Measurement, measure
from hfprune.training.publishing import step_tag

if TYPE_CHECKING:
    from hfprune.training.phases import Phase
    from hfprune.training.trainer import PruningTrainer

FOLDER = "sizes"
"""Inside the run's folder; it holds one folder a size, named by the fraction that is left."""


def export_size(trainer: PruningTrainer, phase: Phase) -> None:
    """Saves the model as it is at the end of a phase as the member of a size, where sizes are asked for."""
    if trainer.pruning.export_sizes is None:
        return
    size = trainer.pruning.export_sizes[phase.number - 1]
    if trainer.args.should_save:
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        tokenizer = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
        folder = Path(trainer.args.output_dir) / FOLDER / f"{size:g}"
        save_pretrained(model, folder, trainer.masks or None, tokenizer, **trainer.saving)
    trainer.accelerator.wait_for_everyone()


def measured_sizes(
    trainer: PruningTrainer,
    dense: nn.Module,
    dense_metric: dict[str, float],
    own: bool,
    example: Any,
    batch_sizes: Sequence[int],
) -> list[dict[str, Any]]:
    """What every member costs and how good it is, its folder, and its tag where every step is pushed; the dense model
    comes first, as size 1. The bytes of members that are stored sparse are those on disk.

    All are loaded from their folders and measured in turns, twice; the quicker turn of each counts.

    Args:
        trainer: whose run has ended.
        dense, dense_metric: the dense model, on the device to measure on, and how good it is.
        own: whether the model is neither transformers' nor timm's, so that loading takes an instance.
        example: one example, as the model takes it.
        batch_sizes: for latency.
    """
    sizes = trainer.pruning.export_sizes
    device = next(dense.parameters()).device
    turns: dict[float, list[Measurement]] = {}
    for _ in range(2):
        turns.setdefault(1.0, []).append(measure(dense, example, tuple(batch_sizes)))
        for size in sizes:
            folder = Path(trainer.args.output_dir) / FOLDER / f"{size:g}"
            member = from_pretrained(folder, copy.deepcopy(dense) if own else None).to(device)
            turns.setdefault(size, []).append(measure(member, example, tuple(batch_sizes)))
    metrics = {1.0: dense_metric} | dict(zip(sizes, (step.metric for step in trainer.steps), strict=True))
    return [
        {"size": size, "metric": metrics[size]}
        | min(found, key=lambda m: sum(m.latency_ms.values())).to_dict()
        | (_place(trainer, size) if size < 1 else {})
        for size, found in turns.items()
    ]


def _place(trainer: PruningTrainer, size: float) -> dict[str, Any]:
    """Where a member lies, beside the run's other files and on the Hub."""
    folder = Path(trainer.args.output_dir) / FOLDER / f"{size:g}"
    found: dict[str, Any] = {"folder": f"{FOLDER}/{size:g}"}
    if trainer.push_every_step:
        found["tag"] = step_tag(trainer.method.measured, 1 - size)
    if trainer.saving.get("sparse") is not None:
        found["bytes"] = bytes_on_disk(folder)
    return found
