"""The files in a checkpoint that say where pruning stands: plain JSON and safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from hfprune.checkpoint.files import write_text
from hfprune.checkpoint.save import unshared
from hfprune.errors import CheckpointError
from hfprune.masks import MaskSet
from hfprune.training.phases import PruningState

if TYPE_CHECKING:
    from hfprune.training.trainer import PruningTrainer

STATE_FILE = "pruning_state.json"
MASKS_FILE = "pruning_masks.safetensors"
BEST_FILE = "pruning_best.safetensors"
HISTORY_FILE = "pruning_history.safetensors"

FORMAT_VERSION = 1


def save_state(trainer: PruningTrainer, folder: Path) -> None:
    """Writes the state, the masks, the best weights of the running phase, and the movement."""
    recovery = trainer.recovery
    if recovery is not None:
        trainer.progress.best = recovery.state()
    values = {
        "format_version": FORMAT_VERSION,
        "pruning": trainer.pruning.model_dump(mode="json"),
        "digest": trainer.masks.digest(),
        "pattern": trainer.masks.pattern,
        "state": trainer.progress.to_dict(),
    }
    if (structure := trainer.method.state()) is not None:
        values["structure"] = structure
    if len(trainer.masks):
        save_file(trainer.masks.state_dict(), folder / MASKS_FILE)
    if recovery is not None and recovery.weights is not None and not trainer.progress.done:
        save_file(unshared(recovery.weights), folder / BEST_FILE)
    if trainer.history:
        save_file({name: value.contiguous() for name, value in trainer.history.items()}, folder / HISTORY_FILE)
    if trainer.guard is not None:
        trainer.guard.save(folder)
    write_text(folder / STATE_FILE, json.dumps(values, indent=2) + "\n")


def load_state(trainer: PruningTrainer, folder: Path) -> dict[str, torch.Tensor] | None:
    """Takes up what `save_state` wrote.

    Returns:
        The best weights of the phase so far, where there are any.

    Raises:
        CheckpointError: the checkpoint is not one of a pruning run, is of a newer format, of another pruning
            configuration, or does not hold the masks that it says.
    """
    path = folder / STATE_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"'{folder}' is not a checkpoint of a pruning run: it holds no {STATE_FILE}") from error
    except ValueError as error:
        raise CheckpointError(f"'{path}' can't be read: {error}") from error
    if values["format_version"] > FORMAT_VERSION:
        raise CheckpointError(f"'{path}' was written by a newer version in format {values['format_version']}")
    now = trainer.pruning.model_dump(mode="json")
    for key, value in values["pruning"].items():
        if now.get(key) != value:
            raise CheckpointError(
                f"pruning.{key}: the checkpoint '{folder}' was made with {json.dumps(value)}, not "
                f"{json.dumps(now.get(key))}; resume with the same recipe, or begin anew without --resume"
            )
    if trainer.teacher is not None and values["state"].get("teacher") != trainer.teacher.digest:
        raise CheckpointError(
            f"'{folder}' was made with another teacher; resume with a new trainer around the dense model that the run "
            f"began with"
        )
    trainer.method.load(values.get("structure"))
    packed = load_file(folder / MASKS_FILE) if (folder / MASKS_FILE).is_file() else {}
    trainer.masks = MaskSet.from_state_dict(packed, trainer.model, values["pattern"])
    if trainer.masks.digest() != values["digest"]:
        raise CheckpointError(f"'{folder}': the masks do not match their recorded hash")
    trainer.history = load_file(folder / HISTORY_FILE) if (folder / HISTORY_FILE).is_file() else {}
    device = trainer.args.device
    trainer.history = {name: value.to(device) for name, value in trainer.history.items()}
    trainer.progress = PruningState.from_dict(values["state"])
    if trainer.guard is not None:
        trainer.guard.load(folder)
    best = load_file(folder / BEST_FILE) if (folder / BEST_FILE).is_file() else None
    return best
