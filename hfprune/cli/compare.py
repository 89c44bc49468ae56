"""`hfprune compare`, as the command line takes it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hfprune.terminal import one_line_errors, progress, quiet_libraries


def compare(
    recipe: Annotated[Path, typer.Argument(help="The YAML file; its section `compare` says the grid.")],
    schedules: Annotated[
        str | None, typer.Option(metavar="one_shot,hybrid", help="Instead of compare.schedules.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(metavar="unstructured,low_rank", help="Instead of compare.methods.")
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(metavar=".7,.3", help="With methods: what is left; instead of compare.sizes.")
    ] = None,
    ratios: Annotated[str | None, typer.Option(metavar=".8,.92", help="What goes; instead of compare.ratios.")] = None,
    criteria: Annotated[str | None, typer.Option(metavar="l1,taylor", help="Instead of the recipe's.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="EPOCHS", help="Of fine-tuning a run, over all its steps; or several."),
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Instead: evaluations without improvement that end every step.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="How many runs of each.")] = None,
    steps: Annotated[int | None, typer.Option(help="Pruning steps of the iterative schedules.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As for prune; may be repeated.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Save the pruned model of every run that is made.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Begin a grid of more than 60 runs, too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the runs, and which of them are complete.")] = False,
) -> None:
    """Run methods, schedules, ratios and criteria side by side, and say which won; the same command goes on."""
    with one_line_errors("the same command goes on where it stopped"):
        from hfprune.grid import overrides_of
        from hfprune.recipe import Recipe

        grid = overrides_of(schedules, ratios, criteria, budget, patience, seeds, steps, methods, sizes)
        loaded = Recipe.from_yaml(recipe, [*(overrides or []), *grid])
        quiet_libraries()
        from hfprune.analysis.strategies import compare as run
        from hfprune.analysis.strategies import preview

        console = Console(width=None if sys.stdout.isatty() else 140)
        if dry_run:
            console.print(preview(loaded))
            return
        with progress() as tell:
            found = run(loaded, keep=keep, yes=yes, console=console, progress=tell)
        console.print(found.table(), highlight=False)
        typer.echo(f"\nsaved to {loaded.output.folder}: {', '.join(found.save(loaded.output.folder))}")
