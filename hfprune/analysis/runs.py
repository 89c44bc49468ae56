"""Runs of a grid: each from the same dense model, in the same order of the data, its cost counted."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, set_seed

from hfprune.analysis.methods import Scale, fitted
from hfprune.checkpoint.files import write_text
from hfprune.checkpoint.save import save_pretrained
from hfprune.errors import CheckpointError, TrainingDiverged
from hfprune.grid import Cell
from hfprune.pipeline import Job, make_trainer
from hfprune.training.arguments import training_arguments
from hfprune.training.checkpoints.folder import clear, last_checkpoint
from hfprune.training.progress import PhaseProgress
from hfprune.training.trainer import PruningTrainer

FORMAT_VERSION = 1
RESULT_FILE = "result.json"
"""Written last into a run's folder: it says that the run is complete."""

Tell = Callable[[int], None]
"""Told of every optimizer step of a run."""


class GridTrainer(PruningTrainer):
    """A PruningTrainer whose epochs count on through its phases, so that the k-th epoch of all runs with a seed sees
    the data in the same order, whatever the phases are; and that counts the batches seen for scores."""

    def get_train_dataloader(self) -> Any:
        done = math.ceil(self.progress.epoch_offset)
        self.accelerator.dataloader_config.data_seed = self.args.seed + done
        if hasattr(self.train_dataset, "first_epoch"):
            self.train_dataset.first_epoch = done
        return super().get_train_dataloader()

    def calibration_batches(self) -> Any:
        return _Counted(self, super().calibration_batches())


class _Counted:
    """Batches; every one that is taken counts."""

    def __init__(self, trainer: GridTrainer, batches: Any):
        self.trainer, self.batches = trainer, batches

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.trainer.progress.scored += 1
            yield batch


class _Telling(TrainerCallback):
    def __init__(self, tell: Tell):
        self.tell = tell

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tell(state.global_step)


def updates_per_epoch(job: Job) -> int:
    """Optimizer steps of one epoch."""
    batches = len(job.trainer.get_train_dataloader())
    return -(-batches // job.trainer.args.gradient_accumulation_steps)


def trainer_of(job: Job, dense: nn.Module, cell: Cell, folder: Path, updates: int) -> GridTrainer:
    """The trainer of a run, around a copy of the dense model.

    Args:
        job: the recipe's parts.
        dense: what every run begins with.
        cell: which run.
        folder: of its checkpoints.
        updates: optimizer steps of one epoch.
    """
    pruning = fitted(cell, dense)
    if cell.budget is not None:
        lengths = cell.lengths(len(pruning.targets()), updates)
        recovery = pruning.recovery.model_dump(exclude_unset=True, exclude={"epochs", "patience"}) | {"steps": lengths}
    else:
        recovery = pruning.recovery.model_dump(exclude_unset=True) | {"patience": cell.patience}
    pruning = pruning.model_copy(update={"recovery": type(pruning.recovery).model_validate(recovery)})
    set_seed(cell.seed)
    metrics, values = job.metrics, job.recipe.training | {"seed": cell.seed}
    watched = {"metric": metrics.main, "greater_is_better": metrics.greater_is_better}
    arguments = training_arguments(str(folder), values, **watched, task=job.recipe.data.task)
    loaded = replace(job.loaded, model=copy.deepcopy(dense))
    return make_trainer(loaded, job.data, metrics, arguments, pruning, kind=GridTrainer)


def run_cell(
    trainer: GridTrainer,
    cell: Cell,
    folder: Path,
    facts: dict[str, Any],
    keep: bool,
    tell: Tell,
    scale: Scale | None = None,
) -> dict[str, Any]:
    """Runs one cell and writes its result; goes on from a checkpoint where an interruption left one.

    Args:
        trainer: from `trainer_of`.
        cell: which run.
        folder: the run's own.
        facts: what the result says of the grid.
        keep: save the pruned model too.
        tell: told of every optimizer step.
        scale: weighs the model that is left, where methods are compared.

    Returns:
        The result, as `RESULT_FILE` holds it. A run whose loss stopped being a number has no value but the reason.
    """
    trainer.remove_callback(PhaseProgress)
    trainer.add_callback(_Telling(tell))
    last, reason = last_checkpoint(folder) if folder.is_dir() else None, ""
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    except TrainingDiverged as error:
        reason = str(error)
    steps = trainer.steps
    metric = dict(steps[-1].metric or {}) if steps and not reason else {}
    value = metric.get(facts["main_metric"])
    if not reason and (value is None or not math.isfinite(value)):
        reason = f"{facts['main_metric']} is {value}"
    result = {
        "format_version": FORMAT_VERSION,
        "schedule": cell.schedule,
        "ratio": cell.ratio,
        "criterion": cell.criterion_words,
        "seed": cell.seed,
        "budget": cell.budget,
        "patience": cell.patience,
        "value": None if reason else value,
        "failed": reason,
        "metric": {name: number for name, number in metric.items() if math.isfinite(number)},
        "achieved": trainer.achieved,
        "cost": _cost(trainer),
        "targets": [step.target for step in steps],
        **facts,
        **_of_method(cell, trainer, scale if not reason else None),
    }
    folder.mkdir(parents=True, exist_ok=True)
    if keep and not reason:
        save_pretrained(trainer.model, folder, trainer.masks, trainer.processing_class)
    write_text(folder / RESULT_FILE, json.dumps(result, indent=2) + "\n")
    clear(folder)
    return result


def _cost(trainer: GridTrainer) -> dict[str, float]:
    return {
        "epochs": round(sum(step.epochs for step in trainer.steps), 4),
        "optimizer_steps": trainer.state.global_step,
        "seconds": round(trainer.progress.seconds, 3),
        "scoring_batches": trainer.progress.scored,
    }


def _of_method(cell: Cell, trainer: GridTrainer, scale: Scale | None) -> dict[str, Any]:
    """What a result says of its method, and of the model that is left."""
    if cell.method is None:
        return {}
    said = {
        "method": cell.method.name,
        "kind": cell.method.kind,
        "granularity": trainer.pruning.granularities,
        "size": cell.size,
        "looks_at_data": trainer.pruner.needs_data,
        "measured": trainer.method.measured,
        "removal": trainer.pruning.is_structural,
    }
    return said | ({"model": scale.weigh(trainer)} if scale is not None else {})


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a run that is complete, else None.

    Raises:
        CheckpointError: it can't be read, or was written by a newer version.
    """
    path = folder / RESULT_FILE
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        version = result["format_version"]
    except FileNotFoundError:
        return None
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"'{path}' can't be read; delete it, and the run is made again: {error}") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(f"'{path}' was written by a newer version in format {version}")
    return result
