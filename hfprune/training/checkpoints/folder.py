"""A run's folder of checkpoints: which are whole, how a new one gets there, and which old ones go."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from hfprune.checkpoint.files import settle, sync
from hfprune.checkpoint.tensors import tensor_files
from hfprune.errors import CheckpointError

SIDE = ".writing-"
_GOING = ".removing-"
_REPLACED = ".replaced-"


def last_checkpoint(folder: str | Path) -> Path | None:
    """The latest whole checkpoint of a run's folder; what a killed process left half done is set right or removed.

    Where several processes run, all of them call this: the first sets right, the others wait for it.
    """
    folder = Path(folder)
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not together or torch.distributed.get_rank() == 0:
        set_right(folder)
    if together:
        torch.distributed.barrier()
    return last_whole(folder)


def set_right(folder: Path) -> None:
    """Puts back what was being replaced, and removes what was being written."""
    for replaced in folder.glob(f"{_REPLACED}checkpoint-*"):
        original = folder / replaced.name.removeprefix(_REPLACED)
        if original.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(original)
    for prefix in (SIDE, _GOING):
        for half in folder.glob(f"{prefix}*"):
            shutil.rmtree(half, ignore_errors=True)


def last_whole(folder: Path) -> Path | None:
    """The latest checkpoint that is whole."""
    for path in reversed(_in_order(folder)):
        if is_whole(path):
            return path
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether all that a checkpoint holds can be opened: tensors, plain values, the optimizer's archives."""
    try:
        tensor_files(checkpoint)
        for path in checkpoint.iterdir():
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
                return False
    except (OSError, ValueError, SafetensorError, CheckpointError):
        return False
    return (checkpoint / "trainer_state.json").is_file()


def move_into_place(source: Path, target: Path) -> None:
    """Moves a checkpoint that is on the disk to where it is looked for."""
    settle(source)
    aside = target.with_name(f"{_REPLACED}{target.name}")
    if target.exists():
        target.rename(aside)
    source.rename(target)
    sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def retain(folder: Path, limit: int | None, newest: str, best: str | None) -> None:
    """Removes old checkpoints until so many are left; never the newest, the best, or the only one that is whole.

    Args:
        folder: of the run.
        limit: how many may be left; None or 0 for all.
        newest: the name of the one just written, which is whole.
        best: the path of the one with the best metric.
    """
    if not limit or limit < 0:
        return
    kept = {newest, *([Path(best).name] if best else [])}
    found = _in_order(folder)
    # What can't be read back takes nobody's place.
    rest = sorted((path for path in found if path.name not in kept), key=is_whole)
    for path in rest[: max(0, len(found) - max(limit, len(kept)))]:
        _remove(path)


def clear(folder: Path) -> None:
    """Removes all checkpoints, of a run that needs none any more."""
    for path in _in_order(folder):
        _remove(path)
    set_right(folder)


def _remove(path: Path) -> None:
    """Removes a checkpoint; a kill on the way leaves none that looks like one."""
    going = path.with_name(f"{_GOING}{path.name}")
    path.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def _in_order(folder: Path) -> list[Path]:
    """Checkpoints by their optimizer step."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))
