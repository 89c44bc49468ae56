"""What the structural engine does on whole model zoos, each model in a process of its own with a limit on its time.

python scripts/bench_structure.py [timm] [transformers] [checks] [speed] [--only NAME] [--peer]

timm          the smallest model of every family, at half its multiply-accumulates
transformers  tiny models of 49 types, at half their heads and neurons
checks        models whose size at half of all units is known
speed         time and memory of grouping and cutting a ViT-B/16, and the grouping of a Llama of a billion parameters

A row is good when the pruned model proved equal to the silenced original, was saved and loaded, and answers alike.
Weights are random. With --peer, Torch-Pruning (which must be installed) does the same beside it. The exit code is 1
when a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table
from structure_rows import CHECKS, Row, check_row, timm_row, transformers_row

MODULES = ["hfprune.oneshot", "hfprune.checkpoint", "structure_rows", "structure_peer", "torch._dynamo", "torch.export"]
GOALS = {"timm": (90, 98), "transformers": (46, 49)}


def _child(answer: multiprocessing.connection.Connection, errors: str, make: Callable[[str], Row], name: str) -> None:
    """Runs in the process of one row; what it says, and the traceback that ends it, go to a file."""
    log = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    answer.send(make(name))


def isolated(make: Callable[[str], Row], name: str, limit: float, method: str = "forkserver") -> Row:
    """The row of one model; a crash, an error or a hang makes a failed one."""
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(MODULES)
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder) / "errors"
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(writer, str(errors), make, name))
        process.start()
        writer.close()
        try:
            if not reader.poll(limit):
                process.kill()
                return Row(False, reason=f"ran past {limit:.0f} s")
            return reader.recv()
        except EOFError:
            process.join()
            return Row(False, reason=_last_error(errors, process.exitcode))
        finally:
            process.join()


def _last_error(log: Path, code: int | None) -> str:
    """The line that names the error which ended a process."""
    if code is not None and code < 0:
        return f"killed by signal {-code}"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    named = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt|Unsupported)\b", line)]
    return (named or lines or [f"ended with code {code}"])[-1].strip()


def smallest_of_families(cache: Path | None) -> dict[str, str]:
    """Module of timm's registry to the model of the fewest parameters in it, counted on the meta device.

    Args:
        cache: a file that holds the answer of an earlier run, or will.
    """
    if cache is not None and cache.exists():
        return {family: name for family, (_, name) in json.loads(cache.read_text()).items()}
    import timm
    import torch

    found = {}
    for family in timm.list_modules():
        sizes = []
        for name in timm.list_models(module=family):
            try:
                with torch.device("meta"):
                    model = timm.create_model(name)
            except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
                print(f"{name} can't be built on the meta device: {str(error).splitlines()[0]}", file=sys.stderr)
                continue
            sizes.append((sum(p.numel() for p in model.parameters()), name))
        if sizes:
            found[family] = min(sizes)
    if cache is not None:
        cache.write_text(json.dumps(found))
    return {family: name for family, (_, name) in found.items()}


def chosen(names: Iterator[str] | list[str], only: list[str]) -> list[str]:
    """The rows that were asked for."""
    return [name for name in names if not only or name in only]


class Report:
    """A table that is filled row by row, each also printed as a line as soon as it is there."""

    def __init__(self, title: str, columns: list[str]):
        self.console = Console(width=240, soft_wrap=True)
        self.table = Table(title=title, title_justify="left")
        self.columns = columns
        for column in [*columns, "ok", "reason"]:
            self.table.add_column(column, overflow="fold")
        self.good = self.count = 0

    def add(self, row: Row, **cells: str) -> None:
        """One model."""
        self.good += row.ok
        self.count += 1
        texts = [(row.cells | cells).get(column, "") for column in self.columns]
        self.table.add_row(*texts, "yes" if row.ok else "NO", row.reason)
        print("  ".join([*texts, "yes" if row.ok else "NO", row.reason]), file=sys.stderr, flush=True)

    def show(self, note: str = "") -> None:
        """The whole table."""
        self.console.print(self.table)
        self.console.print(f"{self.good} of {self.count} good{note}\n")


def timm_table(options: argparse.Namespace) -> bool:
    """The smallest model of every family."""
    columns = ["family", "model", "params", "MACs", "reached", "groups cut", "seconds"]
    if options.peer:
        columns += ["peer", "peer seconds"]
    report = Report("timm: half the multiply-accumulates of every family's smallest model", columns)
    models = smallest_of_families(options.cache)
    peers = 0
    for family in chosen(list(models), options.only):
        cells = {"family": family, "model": models[family]}
        row = isolated(timm_row, models[family], options.limit)
        if options.peer:
            from structure_peer import timm_peer_row

            peer = isolated(timm_peer_row, models[family], options.peer_limit)
            peers += peer.ok
            cells["peer"] = f"{peer.cells.get('left', '')} ok" if peer.ok else peer.reason[:60]
            cells["peer seconds"] = peer.cells.get("seconds", "")
        report.add(row, **cells)
    report.show(f"; Torch-Pruning {peers}" if options.peer else "")
    return _reached("timm", report, options)


def transformers_table(options: argparse.Namespace) -> bool:
    """Tiny models of every type."""
    from structure_models import all_models

    columns = ["type", "class", "params", "heads", "neurons", "channels", "generates", "seconds"]
    report = Report("transformers: half of the heads and neurons of tiny models", columns)
    for name in chosen(list(all_models()), options.only):
        report.add(isolated(transformers_row, name, options.limit), type=name)
    report.show()
    return _reached("transformers", report, options)


def _reached(name: str, report: Report, options: argparse.Namespace) -> bool:
    """Whether as many rows are good as wanted; with --only, all of them."""
    least, whole = GOALS[name]
    return report.good >= (report.count if options.only or report.count < whole else least)


def checks_table(options: argparse.Namespace) -> bool:
    """Sizes that are known."""
    columns = ["model", "parameters", "known parameters", "MACs", "MACs, layers alone", "known MACs"]
    report = Report("checks: half of all units, uniformly", columns)
    for name in chosen(list(CHECKS), options.only):
        report.add(isolated(check_row, name, options.limit), model=name)
    report.show()
    return report.good == report.count


def speed_table(options: argparse.Namespace) -> bool:
    """Ratios of time and memory."""
    from structure_speed import speed_rows

    report = Report("speed", ["what", "hfprune", "beside", "ratio", "bound"])
    for row in speed_rows(isolated, options):
        report.add(row)
    report.show()
    return report.good == report.count


TABLES = {"timm": timm_table, "transformers": transformers_table, "checks": checks_table, "speed": speed_table}


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; all by default")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this row alone; may be repeated")
    parser.add_argument("--peer", action="store_true", help="Torch-Pruning beside it")
    parser.add_argument("--limit", type=float, default=300, help="seconds a row may take")
    parser.add_argument("--peer-limit", type=float, default=90, help="seconds Torch-Pruning may take a row")
    parser.add_argument("--cache", type=Path, help="a file for the smallest models of timm's families")
    parser.add_argument("--runs", type=int, default=3, help="of which speeds are medians")
    options = parser.parse_args()
    if unknown := set(options.tables) - set(TABLES):
        parser.error(f"unknown table: {', '.join(sorted(unknown))}")
    good = [TABLES[name](options) for name in options.tables or TABLES]
    packages = ", ".join(_version(name) for name in ("torch", "transformers", "timm", "torch-pruning"))
    print(f"{packages}, Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} CPUs")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
