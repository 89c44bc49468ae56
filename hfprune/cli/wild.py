"""`hfprune wild`: recognisers on real recordings with human-made subtitles."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from hfprune.cli.study import study
from hfprune.errors import ConfigError
from hfprune.terminal import one_line_errors, printable, progress, quiet_libraries

if TYPE_CHECKING:
    from hfprune.wild.plan import Plan

app = typer.Typer(
    no_args_is_help=True,
    help="Test recognisers, dense and pruned, on real recordings with human-made subtitles: plan, run, report.",
)

plans = typer.Typer(
    no_args_is_help=True,
    help="Write a test plan: recordings whose subtitles people made; automatic captions never count.",
)
app.add_typer(plans, name="plan")

_PlanOption = Annotated[Path, typer.Option("--output", help="The plan, a JSON file.")]
_NameOption = Annotated[str | None, typer.Option("--name", help="How reports call the plan.")]
_LanguageOption = Annotated[
    str | None, typer.Option("--language", metavar="en", help="Of speech and references, where the data don't say it.")
]
_LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="So many recordings at most.")]


@plans.command()
def youtube(
    category: Annotated[str | None, typer.Option("--category", help="Its title or number.")] = None,
    query: Annotated[str | None, typer.Option("--query", help="Words; by default the category's title.")] = None,
    language: Annotated[str, typer.Option("--language", help="Of speech and subtitles.")] = "en",
    region: Annotated[str, typer.Option("--region", help="The country of the viewers.")] = "US",
    duration: Annotated[
        Literal["short", "medium", "long", "any"],
        typer.Option("--duration", help="Below 4, 4 to 20, above 20 minutes."),
    ] = "medium",
    licence: Annotated[Literal["creativeCommon", "youtube", "any"], typer.Option("--licence")] = "creativeCommon",
    results: Annotated[int, typer.Option("--results", min=1, max=50, help="Videos a page.")] = 10,
    iterations: Annotated[
        int, typer.Option("--iterations", min=1, help="Pages; each costs 101 units of the day's quota.")
    ] = 1,
    page_token: Annotated[str | None, typer.Option("--page-token", help="Go on where another plan ended.")] = None,
    output: _PlanOption = Path("plan.json"),
    name: _NameOption = None,
) -> None:
    """From YouTube; the key of its Data API stands in the environment variable YOUTUBE_API_KEY."""
    with one_line_errors():
        _refuse_existing(output)
        from hfprune.wild.youtube import Search, plan_youtube

        search = Search(category, query, language, region, duration, licence, results, iterations, page_token)
        _keep(plan_youtube(search, name, tell=lambda line: typer.echo(line, err=True)), output)


@plans.command()
def folder(
    path: Annotated[Path, typer.Argument(help="Sound or video files; NAME.srt, .vtt or .txt beside NAME.mp4.")],
    language: _LanguageOption = None,
    limit: _LimitOption = None,
    output: _PlanOption = Path("plan.json"),
    name: _NameOption = None,
) -> None:
    """From a folder of recordings with their transcripts, or with a metadata.jsonl that holds them."""
    with one_line_errors():
        _refuse_existing(output)
        from hfprune.wild.folder import plan_folder

        _keep(plan_folder(path, language, name, limit), output)


@plans.command()
def dataset(
    source: Annotated[str, typer.Argument(help="A dataset on the Hub, or a parquet file or folder of them.")],
    config: Annotated[str | None, typer.Option("--config", help="Its configuration.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="By default test.")] = None,
    audio_column: Annotated[str | None, typer.Option("--audio-column")] = None,
    text_column: Annotated[str | None, typer.Option("--text-column")] = None,
    language: _LanguageOption = None,
    limit: _LimitOption = None,
    output: _PlanOption = Path("plan.json"),
    name: _NameOption = None,
) -> None:
    """From a dataset with columns of audio and text."""
    with one_line_errors():
        _refuse_existing(output)
        quiet_libraries()
        from hfprune.wild.rows import plan_dataset

        columns = {"audio_column": audio_column, "text_column": text_column}
        made = plan_dataset(source, config=config, split=split, language=language, name=name, limit=limit, **columns)
        _keep(made, output)


def _refuse_existing(output: Path) -> None:
    if output.exists():
        raise ConfigError(f"--output: '{output}' exists, and may hold results; name another file")


def _keep(made: Plan, output: Path) -> None:
    """Writes a plan, and says what is in it."""
    made.write(output)
    typer.echo(f"{output}: {len(made.testable)} items to test")
    if left := [item for item in made.items if item.reason is not None]:
        typer.echo(f"{len(left)} can't be tested and stay in the plan with the reason:")
        for item in left[:10]:
            typer.echo(f"  {printable(item.key)}: {printable(item.reason or '')}")
        if len(left) > 10:
            typer.echo(f"  and {len(left) - 10} more")
    if made.next_page_token:
        typer.echo(f"more there: --page-token {made.next_page_token}")


@app.command()
def run(
    plan: Annotated[Path, typer.Argument(help="A file that `hfprune wild plan` wrote; results go into it too.")],
    models: Annotated[
        list[str], typer.Option("--models", help="Checkpoint folders or names on the Hub, the dense one first.")
    ],
    more: Annotated[list[str] | None, typer.Argument(metavar="[MODEL]...", help="More models.")] = None,
    output: Annotated[Path, typer.Option("--output", help="The folder of wild.sqlite.")] = Path("runs/wild"),
    workers: Annotated[int, typer.Option("--workers", min=1, help="Items fetched and decoded at a time.")] = 2,
    language: Annotated[str | None, typer.Option("--language", help="Instead of the plan's or the items' own.")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Try again what failed.")] = False,
    cache: Annotated[Path | None, typer.Option("--cache", help="Of downloads; by default OUTPUT/cache.")] = None,
    cache_size: Annotated[str, typer.Option("--cache-size", metavar="2GB", help="Of all downloads together.")] = "2GB",
    delete_cache: Annotated[bool, typer.Option("--delete-cache", help="Delete downloads after use.")] = False,
    device: Annotated[str | None, typer.Option("--device", help="By default CUDA where there is one.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Chunks of a recording at a time.")] = 8,
    chunk: Annotated[float, typer.Option("--chunk", min=1.0, help="Seconds of a chunk.")] = 30.0,
    beams: Annotated[int, typer.Option("--beams", min=1, help="Of encoder-decoders such as Whisper.")] = 1,
) -> None:
    """Transcribe a plan's recordings with several models and measure them; the same command goes on."""
    with one_line_errors("the same command goes on with what is missing"):
        size = _bytes(cache_size)
        quiet_libraries()
        from hfprune.wild.run import Settings
        from hfprune.wild.run import run as test
        from hfprune.wild.summary import summary

        settings = Settings(
            workers,
            language,
            retry,
            cache,
            size,
            delete_cache,
            device=device,
            batch_size=batch_size,
            chunk=chunk,
            beams=beams,
        )
        with _progress() as tell:
            number = test(plan, [*models, *(more or [])], output, settings, tell=tell)
        Console(width=None if sys.stdout.isatty() else 120).print(summary(output, number), highlight=False)
        typer.echo(f"\nsaved to {output / 'wild.sqlite'} and {plan}")


@app.command()
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
        Console(width=None if sys.stdout.isatty() else 140).print(found.table(), highlight=False)
        where = output or (run if run.is_dir() else run.parent)
        typer.echo(f"\nsaved to {where}: {', '.join(found.files)}{f'; {card}: README.md' if card else ''}")


app.command()(study)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar in a terminal, a line an item elsewhere."""
    if sys.stderr.isatty():
        from rich.markup import escape

        with progress() as tell:
            yield lambda words, done, total: tell(escape(printable(words)), done, total)
    else:
        yield lambda words, done, total: typer.echo(f"{done}/{total} {printable(words)}", err=True)


def _bytes(text: str) -> int:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise ConfigError(f"--cache-size: '{text}' is no size; give e.g. 500MB or 2GB") from None
