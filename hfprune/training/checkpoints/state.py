"""The files in a checkpoint that say where pruning stands: plain JSON and safetensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from hfprune.checkpoint.files import write_text
from hfprune.checkpoint.save import unshared
from hfprune.errors import CheckpointError
from hfprune.masks import MaskSet
from hfprune.sharding import part_of
from hfprune.training.phases import PruningState

if TYPE_CHECKING:
    from hfprune.training.trainer import PruningTrainer

STATE_FILE = "pruning_state.json"
MASKS_FILE = "pruning_masks.safetensors"
BEST_FILE = "pruning_best.safetensors"
HISTORY_FILE = "pruning_history.safetensors"

FORMAT_VERSION = 1


class Held(NamedTuple):
    """Whole tensors that belong to a checkpoint beside the model's: the masks, the best weights of the running phase,
    and the movement."""

    masks: MaskSet
    best: Mapping[str, torch.Tensor] | None
    history: Mapping[str, torch.Tensor]


def held_by(trainer: PruningTrainer) -> Held:
    """What a trainer holds now; of a sharded model the parts that lie here."""
    recovery = trainer.recovery
    best = recovery.weights if recovery is not None and not trainer.progress.done else None
    return Held(trainer.masks, best, trainer.history)


def save_state(trainer: PruningTrainer, folder: Path, held: Held) -> None:
    """Writes the state and what is held beside the model."""
    recovery = trainer.recovery
    if recovery is not None:
        trainer.progress.best = recovery.state()
    values = {
        "format_version": FORMAT_VERSION,
        "pruning": trainer.pruning.model_dump(mode="json"),
        "model": trainer.given_model,
        "digest": held.masks.digest(),
        "pattern": held.masks.pattern,
        "state": trainer.progress.to_dict(),
    }
    if (structure := trainer.method.state()) is not None:
        values["structure"] = structure
    if len(held.masks):
        save_file(held.masks.state_dict(), folder / MASKS_FILE)
    if held.best is not None:
        save_file(unshared(held.best), folder / BEST_FILE)
    if held.history:
        save_file({name: value.contiguous() for name, value in held.history.items()}, folder / HISTORY_FILE)
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
    if values.get("model", trainer.given_model) != trainer.given_model:
        raise CheckpointError(
            f"'{folder}' was made of another model ({values['model']['class']}), or of this one in other sizes; resume "
            f"with the model that the run began with"
        )
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
    masks = MaskSet.from_state_dict(packed, trainer.model, values["pattern"])
    if masks.digest() != values["digest"]:
        raise CheckpointError(f"'{folder}': the masks do not match their recorded hash")
    trainer.masks = trainer.own_masks(masks)
    trainer.history = {
        name: value.to(trainer.args.device) for name, value in _own_parts(trainer, folder / HISTORY_FILE).items()
    }
    trainer.progress = PruningState.from_dict(values["state"])
    if trainer.guard is not None:
        trainer.guard.load(folder)
    return _own_parts(trainer, folder / BEST_FILE) or None


def _own_parts(trainer: PruningTrainer, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, of a sharded model's the parts that lie here; nothing where there is no such file."""
    if not path.is_file():
        return {}
    like = trainer.model.state_dict()
    with safe_open(path, framework="pt") as file:
        return {name: part_of(file.get_tensor(name), like[name]).cpu() for name in file.keys()}  # noqa: SIM118


def signature_of(model: nn.Module) -> dict[str, str]:
    """What tells a model from others: its class, and a hash of the names and shapes of its tensors."""
    tensors = [
        (name, tuple(value.shape)) for name, value in sorted(model.state_dict().items()) if hasattr(value, "shape")
    ]
    return {"class": type(model).__name__, "shapes": hashlib.sha256(repr(tensors).encode()).hexdigest()}
