"""Made recordings as a folder that plans and recipes read: sound files, and what is said in `metadata.jsonl`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from hfprune.errors import CheckpointError
from hfprune.speech.audio import write_audio
from hfprune.speech.corpus import Made

Tell = Callable[[str, int, int], None]


def write_recordings(folder: Path, made: Iterable[Made], count: int, tell: Tell) -> None:
    """Writes recordings into a folder that is there when all of them are; a complete one is left as it is.

    Args:
        folder: of the files.
        made: the recordings, one at a time.
        count: how many there will be.
        tell: is told of each.

    Raises:
        CheckpointError: they can't be written; nothing is left of those that were.
    """
    if folder.is_dir():
        return
    side = folder.parent / f".{folder.name}-making"
    try:
        shutil.rmtree(side, ignore_errors=True)  # of one that was interrupted
        side.mkdir(parents=True)
        with (side / "metadata.jsonl").open("w", encoding="utf-8") as lines:
            for done, each in enumerate(made):
                tell(f"making speech: {folder.name}", done, count)
                write_audio(side / f"{each.name}.wav", each.samples)
                lines.write(json.dumps(each.row(), ensure_ascii=False) + "\n")
        os.replace(side, folder)
    except OSError as error:
        raise CheckpointError(f"speech can't be written to '{folder}': {error.strerror or error}") from error
    finally:
        shutil.rmtree(side, ignore_errors=True)
