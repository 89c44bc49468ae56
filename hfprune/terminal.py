"""What all commands share: errors as one line, interruptions, quiet libraries, a bar."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from hfprune.errors import HfpruneError, Terminated
from hfprune.stopping import handled


@contextmanager
def one_line_errors(way_on: str | None = None) -> Iterator[None]:
    """Known errors as one line and exit code 2; interruptions with the way to go on and the signal's exit code."""
    try:
        with handled():
            yield
    except HfpruneError as error:
        typer.echo(f"error: {error}", err=True)
        _leave(2)
    except (KeyboardInterrupt, Terminated) as error:
        hint = f"; {way_on}" if way_on else ""
        typer.echo(f"\ninterrupted{hint}", err=True)
        _leave(error.code if isinstance(error, Terminated) else 130)


def _leave(code: int) -> None:
    raise typer.Exit(code)


def part_in_order() -> None:
    """Ends the group of processes, where there is one: left to the interpreter's exit it may abort.

    Its threads end with the last reference to it, and a wrapped model in a cycle of references holds one.
    """
    from accelerate import PartialState

    PartialState().destroy_process_group()
    gc.collect()


def quiet_libraries() -> None:
    """Leaves progress to hfprune's own lines: one voice in the terminal."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import logging

    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.getLogger("timm").setLevel(logging.ERROR)


def printable(text: str) -> str:
    """A name, title or reason that others wrote, without what would steer the terminal."""
    return "".join(letter for letter in text if letter.isprintable())


@contextmanager
def progress() -> Iterator[Any]:
    """A bar on the error output of a terminal; what it gives is told of every step."""
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    task = bar.add_task("", total=None)

    def tell(words: str, done: int, total: int) -> None:
        bar.start()  # not before: what runs until then may have a bar of its own
        bar.update(task, description=words, completed=done, total=total)

    try:
        yield tell
    finally:
        bar.stop()
