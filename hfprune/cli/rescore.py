"""`hfprune rescore`, as the command line takes it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hfprune.errors import HfpruneError
from hfprune.terminal import one_line_errors, progress, quiet_libraries


def rescore(
    lists: Annotated[
        Path, typer.Argument(metavar="NBEST", help="JSON lines: reference, language, hypotheses of text and score.")
    ],
    models: Annotated[
        list[str],
        typer.Option("--models", help="Causal language models, folders or names on the Hub, the dense first."),
    ],
    more: Annotated[list[str] | None, typer.Argument(metavar="[MODEL]...", help="More models.")] = None,
    development: Annotated[
        Path | None,
        typer.Option(help="Other lists, on which weight and penalty are chosen; else each half's for the other half."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Hypotheses at once.")] = 32,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all of it as JSON.")] = None,
) -> None:
    """Rank a recogniser's n-best lists anew with language models, and measure each: WER, perplexity, bytes, time."""
    with one_line_errors():
        quiet_libraries()
        from hfprune.analysis.rescored import rescore_with
        from hfprune.checkpoint.files import write_text
        from hfprune.speech.nbest import read_nbest, usable
        from hfprune.speech.rescoring import Lists

        parts = []
        for path in (lists, development):
            kept, lost = usable(read_nbest(path)) if path is not None else (None, "")
            if lost:
                typer.echo(f"{path}: {lost}", err=True)
            parts.append(None if kept is None else Lists(kept))
        test, other = parts
        rows: list[dict[str, Any]] = []
        with progress() as tell:
            for name in dict.fromkeys([*models, *(more or [])]):
                words = f"rescoring with {name}"
                try:
                    found = rescore_with(name, test, other, batch_size, lambda k, n, words=words: tell(words, k, n))
                except HfpruneError as error:
                    found = {"failed": str(error)}
                rows.append({"model": name, **found})
        report = {
            "lists": str(lists),
            "development": None if development is None else str(development),
            "utterances": len(test.lists),
            "words": int(test.words.sum()),
            "first_best_wer": test.first_best,
            "oracle_wer": test.oracle,
            "models": rows,
        }
        if json_file is not None:
            write_text(json_file, json.dumps(report, indent=2) + "\n")
        Console(width=None if sys.stdout.isatty() else 120).print(_table(report), highlight=False)
        if any("failed" in row for row in rows):
            raise typer.Exit(2)


def _table(report: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.table import Table

    from hfprune.profiling import human_bytes
    from hfprune.report.tables import percent

    head = f"{report['utterances']} utterances, {report['words']:,} words; the recogniser's own choice: WER "
    head += f"{percent(report['first_best_wer'])}, the best that its lists allow: {percent(report['oracle_wer'])}"
    table = Table(title=head, title_justify="left")
    table.add_column("model", overflow="fold")
    for name in ("WER", "perplexity", "word perplexity", "bytes", "ms, utterance", "weight, penalty"):
        table.add_column(name, justify="right")
    failed = []
    for row in report["models"]:
        if "failed" in row:
            failed.append(f"{row['model']}: {row['failed']}")
            table.add_row(row["model"], "failed", *["–"] * 5)
            continue
        choices = "; ".join(dict.fromkeys(f"{weight:g}, {penalty:g}" for weight, penalty in row["choices"]))
        numbers = f"{row['perplexity']:.4g}", f"{row['word_perplexity']:.4g}"
        spent = f"{row['milliseconds']:.1f}"
        table.add_row(row["model"], percent(row["wer"]), *numbers, human_bytes(row["bytes"]), spent, choices)
    chosen = "on other lists" if report["development"] is not None else "each half's on the other half"
    note = f"weight of the language model and penalty a word: chosen {chosen}; perplexity: of the references"
    return Group(table, note, *failed)
