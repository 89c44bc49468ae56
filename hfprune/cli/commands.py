"""The command line. Bad input gives one line and exit code 2; an interruption says how to go on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hfprune.cli.compare import compare
from hfprune.cli.nbest import nbest
from hfprune.cli.rescore import rescore
from hfprune.cli.wild import app as wild
from hfprune.errors import CheckpointError, ConfigError
from hfprune.terminal import one_line_errors, part_in_order, progress, quiet_libraries

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Prune models with one recipe and one command.")

_RecipeOption = Annotated[Path, typer.Option("--recipe", help="The YAML file that says the whole run.")]
_SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a value, e.g. pruning.target.ratio=.7; may be repeated."),
]
_ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on after an interruption, from the last checkpoint.")]
_StreamOption = Annotated[
    bool, typer.Option("--stream", help="Prune a checkpoint on this machine block by block, without loading it whole.")
]
_DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be pruned.")]


@app.command()
def prune(
    recipe: _RecipeOption,
    overrides: _SetOption = None,
    resume: _ResumeOption = False,
    dry_run: _DryRunOption = False,
    stream: _StreamOption = False,
) -> None:
    """Run a recipe: train the baseline, prune, recover, measure, save."""
    way_on = "nothing was written" if stream else "the same command with --resume goes on from the last checkpoint"
    with one_line_errors(way_on):
        from hfprune.recipe import Recipe

        loaded = Recipe.from_yaml(recipe, overrides)
        quiet_libraries()
        console = Console(width=None if sys.stdout.isatty() else 100)
        if stream:
            _stream(loaded, resume or dry_run, console)
            return
        from hfprune import pipeline
        from hfprune.preview import preview

        if dry_run:
            trainer = pipeline.prepare_run(loaded, console).trainer
            if trainer.is_world_process_zero():
                console.print(preview(trainer))
            del trainer
        else:
            pipeline.run(loaded, resume=resume, console=console)
        part_in_order()


def _stream(recipe: Any, other: bool, console: Console) -> None:
    if other:
        raise ConfigError("--stream: goes with neither --resume nor --dry-run; it begins anew, and trains nothing")
    from hfprune.streamed import run_streamed

    with progress() as tell:
        run_streamed(recipe, console, tell)


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(help="As model.name in a recipe: timm/..., a Hub id, a folder, module:function.")
    ],
    overrides: _SetOption = None,
    granularity: Annotated[
        list[str] | None, typer.Option("--granularity", help="Only these kinds of groups; may be repeated.")
    ] = None,
    input_shape: Annotated[
        str | None,
        typer.Option("--input-shape", metavar="3,32,32", help="One example's shape, for a module of your own."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all of it as JSON.")] = None,
) -> None:
    """Show what can be removed from a model, what it carries, and what is protected and why."""
    with one_line_errors():
        from hfprune.recipe import ModelSection

        section = ModelSection.named(model, overrides)
        quiet_libraries()
        from hfprune.inspection import inspect as look
        from hfprune.models import load_to_inspect

        found = look(load_to_inspect(section), _example(input_shape), granularity)
        Console(width=None if sys.stdout.isatty() else 120).print(found.table(), highlight=False)
        if json_file is not None:
            _write(json_file, json.dumps(found.to_dict(), indent=2) + "\n")


def _example(shape: str | None) -> Any:
    """A batch of one example of a shape such as `3,32,32`; None where none was said."""
    if shape is None:
        return None
    import torch

    try:
        sizes = [int(part) for part in shape.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"--input-shape: '{shape}' is no shape; give sizes with commas, e.g. 3,32,32")
    return torch.randn(1, *sizes, generator=torch.Generator().manual_seed(0))


def _write(path: Path, text: str) -> None:
    from hfprune.checkpoint.files import write_text

    try:
        write_text(path, text)
    except OSError as error:
        raise CheckpointError(f"--json: can't write to '{path}': {error.strerror}") from error


_ModelArgument = Annotated[
    str | None,
    typer.Argument(help="As model.name in a recipe, with its weights; may be left out where --recipe names one."),
]
_WithRecipeOption = Annotated[
    Path | None,
    typer.Option("--recipe", help="Take data, metric and, where none is named, the model from a recipe."),
]
_DataOption = Annotated[str | None, typer.Option("--data", help="As data.name in a recipe.")]
_GranularityOption = Annotated[
    list[str] | None,
    typer.Option("--granularity", help="channel, head, neuron, width, weight or block:RxC; channel where it can be."),
]
_ShapeOption = Annotated[
    str | None, typer.Option("--input-shape", metavar="3,32,32", help="One example's shape, for a module of your own.")
]


@app.command()
def similarity(
    model: _ModelArgument = None,
    criteria: Annotated[str, typer.Option("--criteria", metavar="l1,l2,taylor", help="Those compared.")] = "l1,l2",
    ratio: Annotated[float, typer.Option("--ratio", help="The fraction of the units that would go.")] = 0.5,
    recipe: _WithRecipeOption = None,
    data: _DataOption = None,
    overrides: _SetOption = None,
    granularity: _GranularityOption = None,
    normalize: Annotated[
        str, typer.Option("--normalize", help="What scores are divided by before groups are ranked together.")
    ] = "mean",
    input_shape: _ShapeOption = None,
    output: Annotated[Path, typer.Option("--output", help="The folder of the JSON and the PNG.")] = Path(
        "runs/similarity"
    ),
) -> None:
    """Compare criteria: how alike they rank, whether they tell units apart, which layers they would empty."""
    with one_line_errors():
        names = _listed("--criteria", criteria)
        quiet_libraries()
        from hfprune.analysis import similarity as compare
        from hfprune.analysis.setting import open_setting

        at = open_setting(model, recipe, data, overrides)
        example = _example(input_shape) if input_shape is not None else at.example_inputs
        with progress() as tell:
            found = compare(
                at.model,
                names,
                ratio,
                granularity=_one_or_more(granularity),
                normalize=normalize,
                data=at.data,
                example_inputs=example,
                progress=tell,
            )
        texts = {"similarity.json": json.dumps(found.to_dict(), indent=2) + "\n"}
        _show_analysis(found, output, texts, "similarity.png")


@app.command()
def sensitivity(
    model: _ModelArgument = None,
    ratios: Annotated[str, typer.Option("--ratios", metavar=".1,.3,.5", help="What is tried.")] = "0.1,0.3,0.5,0.7,0.9",
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="The loss of the metric that is tolerated, as a fraction of it.")
    ] = 0.02,
    criterion: Annotated[str, typer.Option("--criterion", help="What chooses the units.")] = "l1",
    recipe: _WithRecipeOption = None,
    data: _DataOption = None,
    overrides: _SetOption = None,
    granularity: _GranularityOption = None,
    input_shape: _ShapeOption = None,
    output: Annotated[Path, typer.Option("--output", help="The folder of the JSON, the PNG and the YAML.")] = Path(
        "runs/sensitivity"
    ),
) -> None:
    """Measure a model after each layer or group alone is pruned; the ratios that it tolerates become a recipe's."""
    with one_line_errors():
        fractions = _numbers("--ratios", ratios)
        quiet_libraries()
        from hfprune.analysis import sensitivity as measure
        from hfprune.analysis.setting import open_setting

        at = open_setting(model, recipe, data, overrides)
        if at.evaluate is None:
            raise ConfigError("--data: nothing to measure the metric on; name the data, or give a --recipe")
        example = _example(input_shape) if input_shape is not None else at.example_inputs
        with progress() as tell:
            found = measure(
                at.model,
                at.evaluate,
                metric=at.metric,
                greater_is_better=at.greater_is_better,
                ratios=fractions,
                tolerance=tolerance,
                criterion=criterion,
                granularity=_one_or_more(granularity),
                data=at.data,
                example_inputs=example,
                progress=tell,
            )
        texts = {"sensitivity.json": json.dumps(found.to_dict(), indent=2) + "\n", "per_layer.yaml": found.to_yaml()}
        _show_analysis(found, output, texts, "sensitivity.png")


def _show_analysis(found: Any, folder: Path, texts: dict[str, str], picture: str) -> None:
    """Prints the tables and leaves the files."""
    from hfprune.checkpoint.files import side_folder, write_text

    Console(width=None if sys.stdout.isatty() else 120).print(found.table(), highlight=False)
    with side_folder(folder) as side:
        for name, text in texts.items():
            write_text(side / name, text)
        found.plot(side / picture)
    typer.echo(f"\nsaved to {folder}: {', '.join([*texts, picture])}")


def _listed(option: str, text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"{option}: none given")
    return names


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in _listed(option, text)]
    except ValueError:
        raise ConfigError(f"{option}: '{text}' must be numbers with commas, e.g. 0.1,0.3,0.5") from None


def _one_or_more(granularity: list[str] | None) -> str | list[str] | None:
    return granularity[0] if granularity and len(granularity) == 1 else granularity or None


app.command()(compare)
app.command()(nbest)
app.command()(rescore)
app.add_typer(wild, name="wild")


_CheckpointArgument = Annotated[str, typer.Argument(help="A checkpoint folder, or OWNER/NAME on the Hub.")]
_RevisionOption = Annotated[str | None, typer.Option("--revision", help="A branch, tag or commit of the repository.")]


@app.command()
def verify(
    checkpoint: _CheckpointArgument,
    revision: _RevisionOption = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Measure the metric as this recipe says, not the checkpoint's own.")
    ] = None,
) -> None:
    """Check every tensor of a checkpoint against its recorded sparsity, and measure its metric again."""
    with one_line_errors():
        from hfprune.checkpoint.verify import verify as check
        from hfprune.hub.reach import folder_of

        quiet_libraries()
        folder = folder_of(checkpoint, revision)
        found = check(folder)
        found.raise_if_bad(checkpoint)
        typer.echo(f"{checkpoint}: {found.words()}")
        from hfprune.remeasure import remeasure

        metric = remeasure(folder, recipe)
        typer.echo(f"{checkpoint}: {metric.words()}")
        metric.raise_if_bad(checkpoint)


@app.command()
def card(
    checkpoint: _CheckpointArgument,
    revision: _RevisionOption = None,
    most: Annotated[int, typer.Option("--tensors", help="Rows of the table of tensors, the largest first.")] = 40,
) -> None:
    """Print what a checkpoint says of itself: base model, what was pruned, zeros a tensor, how to load it."""
    with one_line_errors():
        from hfprune.hub.facts import facts

        console = Console(width=None if sys.stdout.isatty() else 120)
        console.print(facts(checkpoint, revision, most), markup=False, highlight=False)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub; made where it is missing.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="The branch; made where it is missing.")] = None,
    message: Annotated[str | None, typer.Option("--message", help="Of the commit.")] = None,
) -> None:
    """Push a checkpoint to the Hub: weights, card, report, recipe and pictures in one commit."""
    with one_line_errors("the same command sends what is missing"):
        from hfprune.hub.push import push_to_hub

        commit = push_to_hub(folder, repo, private=private or None, revision=revision, message=message, tell=typer.echo)
        typer.echo(commit.commit_url)


@app.command()
def convert(
    folder: Annotated[
        Path, typer.Argument(help="A checkpoint folder; also one of compressed-tensors or torch.nn.utils.prune.")
    ],
    output: Annotated[Path, typer.Argument(help="Where the other one goes.")],
    to: Annotated[
        str, typer.Option(help="bitmask (masked tensors take less room) or dense (loads anywhere; merges factors).")
    ],
) -> None:
    """Write a checkpoint anew with its masked tensors stored sparse, or dense again; the model stays the same."""
    with one_line_errors():
        from hfprune.checkpoint.convert import convert as write
        from hfprune.checkpoint.tensors import bytes_on_disk

        if to not in ("bitmask", "dense"):
            raise ConfigError(f"--to: '{to}' is no way of storing; known: bitmask, dense")
        with progress() as tell:
            write(folder, output, sparse=to == "bitmask", tell=tell)
        before, after = map(bytes_on_disk, (folder, output))
        typer.echo(f"{output}: {after:,} bytes of tensors, {after / max(1, before):.1%} of {before:,}")


def main() -> None:
    """The entry point of the `hfprune` command."""
    app()
