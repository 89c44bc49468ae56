"""`hfprune wild study`, as the command line takes it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hfprune.errors import ConfigError
from hfprune.terminal import one_line_errors, progress, quiet_libraries


def study(
    recipe: Annotated[Path, typer.Argument(help="The YAML file, with a section `wild:`.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a value, e.g. wild.test=8; may be repeated."),
    ] = None,
) -> None:
    """Make speech, train a recogniser on it, prune it at several ratios, and test all of them under every condition.

    Needs no recording and no network. The same command goes on after an interruption.
    """
    with one_line_errors("the same command goes on"):
        from hfprune.recipe import Recipe

        loaded = Recipe.from_yaml(recipe, overrides)
        if loaded.wild is None:
            raise ConfigError(f"wild: missing in {recipe}; `wild: {{}}` takes every default")
        quiet_libraries()
        from hfprune.wild.study import run_study

        console = Console(width=None if sys.stdout.isatty() else 140)
        with progress() as tell:
            run_study(loaded, console, tell)
