"""The folder of a run before the run begins: whether it can go on there, and where an earlier run's files go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from hfprune.checkpoint.files import write_text
from hfprune.errors import CheckpointError, ConfigError
from hfprune.hub.card import RECIPE_FILE, REPORT_FILE
from hfprune.recipe import Recipe, load_yaml

LOCK_FILE = ".run.lock"
"""Held by the run that is at work in a folder."""
_FREE = {
    f"training.{name}"
    for name in (
        "per_device_train_batch_size",  # with another number of processes; a checkpoint checks their product
        "gradient_accumulation_steps",
        "per_device_eval_batch_size",
        "dataloader_num_workers",
        "disable_tqdm",
        "report_to",
        "run_name",
        "save_total_limit",
        "use_cpu",
    )
}
"""Keys that may differ where a run goes on: they say how it is carried out, and not what comes of it."""


@contextmanager
def claimed(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone holds a lock for the time of the block; that of an ended process is free.

    Args:
        path: the lock's file.
        wait: until it is free.
    """
    lock = FileLock(path, timeout=-1 if wait else 0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        yield False
        return
    except OSError as error:
        raise CheckpointError(f"output.folder: can't write to '{path.parent}': {error.strerror}") from error
    try:
        yield True
    finally:
        lock.release()


@contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a run's folder for the time of the block; of an ended process nothing is left that would.

    Raises:
        ConfigError: another run is at work there.
        CheckpointError: the folder can't be written to.
    """
    path = folder / LOCK_FILE
    with claimed(path) as mine:
        # One that goes takes its file along: what was locked in that moment keeps nobody else out.
        if not (mine and path.exists()):
            raise ConfigError(f"output.folder: another run is at work in '{folder}'; wait for it, or name another one")
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()


def ended_run(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The report of a run that has ended; refused where another recipe began it."""
    _check_same_recipe(recipe, folder)
    return json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))


def _check_same_recipe(recipe: Recipe, folder: Path) -> None:
    """Refuses to go on with a run that another recipe began, naming the first key that differs."""
    path = folder / RECIPE_FILE
    if not path.is_file():
        return
    before = Recipe.parse(load_yaml(path.read_text(encoding="utf-8"))).model_dump(mode="json")
    now = recipe.model_dump(mode="json")
    for key, old, new in differences(before, now):
        if not key.startswith("output.") and key not in _FREE:
            raise ConfigError(
                f"{key}: {new!r} now, but the run in '{folder}' was begun with {old!r}; "
                f"resume with the same recipe, or leave out --resume to begin anew"
            )


def differences(before: Any, now: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """The keys whose values differ in two sections of plain values, each with both."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for part in [*before, *(k for k in now if k not in before)]:
            found += differences(before.get(part), now.get(part), f"{key}.{part}" if key else part)
        return found
    return [] if before == now else [(key, before, now)]


def clear_way(folder: Path, recipe: Recipe, resume: bool, console: Console) -> None:
    """Checks a run to go on with, or moves an earlier one aside; then leaves the recipe in the folder."""
    if resume:
        _check_same_recipe(recipe, folder)
    elif folder.is_dir() and any(folder.glob("checkpoint-*")) | (folder / RECIPE_FILE).is_file():
        aside = _move_aside(folder)
        console.print(f"an earlier run in {folder} was moved to {aside}", highlight=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / RECIPE_FILE, recipe.to_yaml())
    except OSError as error:
        raise CheckpointError(f"output.folder: can't write to '{folder}': {error.strerror}") from error


def _move_aside(folder: Path) -> Path:
    previous = folder / "previous"
    number = 1 + max((int(p.name) for p in previous.glob("*") if p.name.isdigit()), default=0)
    aside = previous / str(number)
    aside.mkdir(parents=True)
    # The report goes first: what is left when this is interrupted does not look like a run that has ended.
    for path in sorted(folder.iterdir(), key=lambda p: p.name != REPORT_FILE):
        if path.name not in ("previous", LOCK_FILE):
            shutil.move(path, aside / path.name)
    return aside
