"""`hfprune nbest`, as the command line takes it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hfprune.errors import CheckpointError, ConfigError, DataError
from hfprune.terminal import one_line_errors, printable, progress, quiet_libraries

if TYPE_CHECKING:
    from hfprune.speech.nbest import NBest
    from hfprune.speech.recordings import Recording


def nbest(
    recordings: Annotated[
        Path,
        typer.Argument(
            metavar="RECORDINGS",
            help="A folder of sound or video files and their transcripts, or with a metadata.jsonl.",
        ),
    ],
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help="A recogniser: a folder, or OWNER/NAME on the Hub.")
    ],
    count: Annotated[int, typer.Option("--count", min=1, help="Hypotheses of a list at most.")] = 16,
    beams: Annotated[
        int | None,
        typer.Option("--beams", min=1, help="The width of the search; by default --count, for CTC four times that."),
    ] = None,
    language: Annotated[
        str | None, typer.Option("--language", metavar="en", help="Of speech and transcripts that don't say theirs.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="So many recordings at most.")] = None,
    max_seconds: Annotated[
        float, typer.Option("--max-seconds", metavar="SECONDS", help="Longer recordings are left out.")
    ] = 30.0,
    fuse: Annotated[
        str | None,
        typer.Option("--fuse", metavar="MODEL", help="A causal language model that takes part in CTC's search."),
    ] = None,
    weight: Annotated[
        float | None, typer.Option("--weight", help="Of its log-probability, with --fuse; by default 0.5.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", help="The lists, as JSON lines.")] = Path("nbest.jsonl"),
) -> None:
    """Make n-best lists of recordings with a recogniser, for `hfprune rescore`."""
    with one_line_errors("nothing was written"):
        _check(output, count, beams, fuse, weight)
        quiet_libraries()
        from hfprune.analysis.rescored import load_language_model
        from hfprune.speech.hypotheses import Fusion
        from hfprune.wild.nbest import Lister, recordings_in

        found = recordings_in(recordings, language, limit)
        fusion = None if fuse is None else Fusion(load_language_model(fuse)[0], 0.5 if weight is None else weight)
        lister = Lister(model, count, beams, fusion, max_seconds)
        with progress() as tell:
            words = f"hearing with {model}"
            lists, lost = _written(output, lister(found, language, lambda k, n: tell(words, k, n)))
        for one, reason in lost:
            typer.echo(printable(f"{one.path.relative_to(recordings)}: {reason}"), err=True)
        typer.echo(_summary(output, lists, len(lost)))


def _written(
    output: Path, made: Iterable[tuple[Recording, NBest | str]]
) -> tuple[list[NBest], list[tuple[Recording, str]]]:
    """Writes the lists as they come, into a file that is there once it is whole; and what has a reason instead."""
    from hfprune.checkpoint.files import whole_file
    from hfprune.speech.nbest import NBest, nbest_lines

    lists, lost = [], []
    try:
        with whole_file(output) as side, side.open("w", encoding="utf-8") as lines:
            for one, found in made:
                if isinstance(found, NBest):
                    lists.append(found)
                    lines.write(nbest_lines([found]))
                else:
                    lost.append((one, found))
            if not lists:
                reason = printable(f"{lost[0][0].path.name}: {lost[0][1]}")
                raise DataError(f"not one of {len(lost)} recordings gave a list; {reason}")
    except OSError as error:
        raise CheckpointError(f"can't write '{output}': {error.strerror or error}") from error
    return lists, lost


def _check(output: Path, count: int, beams: int | None, fuse: str | None, weight: float | None) -> None:
    if output.exists():
        raise ConfigError(f"--output: '{output}' exists; name another file")
    if not output.parent.is_dir():
        raise ConfigError(f"--output: no folder '{output.parent}'")
    if beams is not None and beams < count:
        raise ConfigError(
            f"--beams: {beams} can't give {count} hypotheses; say at least as many, or fewer with --count"
        )
    if weight is not None and fuse is None:
        raise ConfigError("--weight: is that of a language model, which --fuse names")


def _summary(output: Path, lists: list[NBest], lost: int) -> str:
    """What stands in the lists, and how well the recogniser does on them."""
    from hfprune.report.tables import percent
    from hfprune.speech.rescoring import Lists

    counted = Lists(lists)
    mean = sum(len(one.hypotheses) for one in lists) / len(lists)
    heard = f"{len(lists)} recording{'s' * (len(lists) != 1)}, {int(counted.words.sum()):,} words"
    left_out = f"; {lost} of {len(lists) + lost} recordings left out" if lost else ""
    return (
        f"{output}: {heard}, {mean:.3g} hypotheses each{left_out}\n"
        f"the recogniser's own choice: WER {percent(counted.first_best)}, "
        f"the best that its lists allow: {percent(counted.oracle)}"
    )
