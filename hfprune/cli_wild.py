"""`hfprune wild`, as the command line takes it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hfprune.terminal import one_line_errors

wild = typer.Typer(no_args_is_help=True, help="Test recognisers on real recordings, and see where pruned ones break.")


@wild.callback()
def _wild() -> None:
    """Keeps `wild` a group of commands."""


@wild.command()
def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run, or its database, wild.sqlite.")],
    output: Annotated[
        Path | None, typer.Option("--output", help="The folder of the page and the others; by default the database's.")
    ] = None,
    card: Annotated[
        Path | None, typer.Option("--card", help="A model's folder, whose card gets the section 'In the wild'.")
    ] = None,
) -> None:
    """Show where pruning hurts: by category, language, length, speed and loudness, with transcripts and a page."""
    with one_line_errors():
        from hfprune.wild.reports import report as make

        found = make(run, output, card)
        Console(width=None if sys.stdout.isatty() else 140).print(found.table())
        where = output or (run if run.is_dir() else run.parent)
        typer.echo(f"\nsaved to {where}: {', '.join(found.files)}{f'; {card}: README.md' if card else ''}")
