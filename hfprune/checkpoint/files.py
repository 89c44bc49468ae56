"""Files that are complete or not there: written to the side, synced, renamed."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hfprune.errors import CheckpointError


@contextmanager
def side_folder(folder: str | Path, replaces: Iterable[str] = ()) -> Iterator[Path]:
    """A temporary folder inside `folder`; its files replace their namesakes in `folder` when the block ends well.

    Args:
        folder: made where it is missing.
        replaces: glob patterns of files in `folder` that the new ones take the place of, whatever they are called.

    Nothing in `folder` changes before the block ends; when it raises, or the disk is full, nothing changes at all.

    Raises:
        CheckpointError: the files could not be written.
    """
    folder = Path(folder)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        side = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    except OSError as error:
        raise CheckpointError(f"can't write to '{folder}': {error.strerror}") from error
    try:
        yield side
        settle(side)
        # config.json goes last: a folder that has it has everything that belongs to it.
        written = sorted(side.iterdir())
        stale = {old for pattern in replaces for old in folder.glob(pattern)} - {folder / new.name for new in written}
        for path in [p for p in written if p.name != "config.json"]:
            _replace(path, folder / path.name)
        for path in stale:
            path.unlink()
        for path in [p for p in written if p.name == "config.json"]:
            _replace(path, folder / path.name)
        sync(folder)
    except BaseException as error:
        shutil.rmtree(side, ignore_errors=True)
        if made:
            with suppress(OSError):
                folder.rmdir()
        if is_write_failure(error):
            raise CheckpointError(f"could not write to '{folder}': {error}; what was there is unchanged") from error
        raise
    side.rmdir()


def is_write_failure(error: BaseException) -> bool:
    """Whether an error says that a file could not be written, as on a full disk."""
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"


def _replace(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(source, target)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well: either the old or the whole new
    file is there."""
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    side = Path(name)
    try:
        yield side
        _set_mode(side, _usual_mode(path.parent))
        sync(side)
        os.replace(side, path)
    except BaseException:
        with suppress(OSError):
            side.unlink()
        raise


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file so that either the old or the whole new text is there."""
    with whole_file(path) as side:
        side.write_text(text, encoding="utf-8")


def settle(folder: Path) -> None:
    """Gives every file in a folder the mode that new files have here, and waits until all of it is on the disk.

    safetensors and temporary files are for their owner alone, which is not what whoever set the umask wanted.
    """
    mode = _usual_mode(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            _set_mode(path, mode)
        sync(path)


def _set_mode(path: Path, mode: int) -> None:
    # Some file systems know no modes.
    with suppress(OSError):
        path.chmod(mode)


def _usual_mode(folder: Path) -> int:
    """The mode of a new file in a folder. The umask itself can only be read by changing it, for all threads at once."""
    handle, name = tempfile.mkstemp(prefix=".mode-", dir=folder)
    os.close(handle)
    probe = Path(name)
    probe.unlink()
    probe.touch()
    try:
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk, where the system can tell."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
