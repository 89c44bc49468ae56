"""What sparse storage saves and costs, as ratios taken in one run: bytes, packing, expanding and loading.

python scripts/bench_checkpoint.py [--size 1.0] [--runs 3] [--folder DIR]

A Llama of about `--size` GB of random weights, pruned at random, is stored dense and sparse. Times are medians of
several runs, done by turns after one that is not counted, so that files are read from a warm cache; rates are in GB of
dense tensors a second. What is written is synced to the disk. By default transformers only maps a dense file, and its
values are read when they are used; `into memory` compares with reading them at once. The exit code is 1 when a bound is
missed.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import hfprune
from hfprune.checkpoint.convert import convert

WIDTH = 1024
SLOWEST = 3.0
"""How many times as long as the dense checkpoint the sparse one may take to load."""


class Case(NamedTuple):
    """What is stored: weights of a dtype, pruned to a ratio or a pattern; and at most how much of the dense bytes."""

    dtype: torch.dtype
    pruned: float | str
    most: float


CASES = {
    "float32, 50 %": Case(torch.float32, 0.5, 0.54),
    "float32, 90 %": Case(torch.float32, 0.9, 0.14),
    "bfloat16, 50 %": Case(torch.bfloat16, 0.5, 0.57),
    "bfloat16, 2:4": Case(torch.bfloat16, "2:4", 0.57),
}


def llama(size: float, case: Case) -> LlamaForCausalLM:
    """A Llama of about `size` bytes, its linear layers pruned at random."""
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_attention_heads=8, vocab_size=1000, tie_word_embeddings=True
    )
    config.num_hidden_layers = max(1, round(size / case.dtype.itemsize / (16 * WIDTH**2)))
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(case.dtype)
    how = {"granularity": case.pruned} if isinstance(case.pruned, str) else {"target": case.pruned}
    hfprune.prune(model, hfprune.PruningConfig(criterion="random", scope="layer", **how))
    return model


def by_turns(acts: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """The median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in acts}
    for turn in range(runs + 1):
        for name, act in acts.items():
            began = time.perf_counter()
            act()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def bytes_of(folder: Path) -> int:
    """Bytes of a folder's safetensors files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A plain dense file, on the disk when this returns."""
    save_file(tensors, path)
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def measure(case: Case, size: float, runs: int, room: Path) -> dict[str, float]:
    """Seconds of every act, and the bytes of both checkpoints."""
    dense, sparse, scratch = room / "dense", room / "sparse", room / "scratch"
    hfprune.save_pretrained(llama(size, case), dense)
    convert(dense, sparse, sparse=True)
    scratch.mkdir()
    file = dense / "model.safetensors"
    tensors = load_file(file)
    seconds = by_turns(
        {
            "write": lambda: write(tensors, scratch / "written.safetensors"),
            "pack": lambda: convert(dense, scratch / "sparse", sparse=True),
            "unpack": lambda: convert(sparse, scratch / "dense", sparse=False),
        },
        runs,
    )
    assert all(torch.equal(t, tensors[n]) for n, t in load_file(scratch / "dense" / file.name).items())
    shutil.rmtree(scratch)
    seconds |= by_turns(
        {
            "read": file.read_bytes,
            "map dense": lambda: LlamaForCausalLM.from_pretrained(dense),
            "load dense": lambda: LlamaForCausalLM.from_pretrained(dense, disable_mmap=True),
            "load sparse": lambda: LlamaForCausalLM.from_pretrained(sparse),
            "check and load dense": lambda: hfprune.from_pretrained(dense),
            "check and load sparse": lambda: hfprune.from_pretrained(sparse),
        },
        runs,
    )
    return seconds | {"dense": bytes_of(dense), "sparse": bytes_of(sparse)}


def rows(case: Case, found: dict[str, float]) -> list[tuple[str, str, str, str, str, bool]]:
    """What, sparse, dense, their ratio, the bound, and whether it is kept."""
    share, slower = found["sparse"] / found["dense"], found["load sparse"] / found["load dense"]

    def rate(act: str) -> str:
        return f"{found['dense'] / found[act] / 1e9:.2f} GB/s"

    def row(what: str, act: str, beside: str) -> tuple[str, str, str, str, str, bool]:
        return what, rate(act), rate(beside), f"{found[act] / found[beside]:.2f}x the time", "", True

    sizes = f"{found['sparse'] / 1e9:.3f} GB", f"{found['dense'] / 1e9:.3f} GB"
    return [
        ("bytes", *sizes, f"{share:.1%}", f"at most {case.most:.0%}", share <= case.most),
        (
            *row("from_pretrained into memory", "load sparse", "load dense")[:4],
            f"at most {SLOWEST:.0f}x",
            slower <= SLOWEST,
        ),
        row("from_pretrained, dense only mapped", "load sparse", "map dense"),
        row("hfprune.from_pretrained, which checks", "check and load sparse", "check and load dense"),
        row("convert --to bitmask; write dense", "pack", "write"),
        row("convert --to bitmask; read dense", "pack", "read"),
        row("convert --to dense; write dense", "unpack", "write"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=1.0, help="GB of dense tensors")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", help="on the disk that is to be measured; by default the temporary one's")
    options = parser.parse_args()
    logging.disable_progress_bar()
    table = Table(title="Sparse on disk", title_justify="left")
    for column in ("weights", "what", "sparse", "dense", "ratio", "bound"):
        table.add_column(column)
    kept = True
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory(dir=options.folder) as room:
            found = measure(case, options.size * 1e9, options.runs, Path(room))
        for what, sparse, dense, ratio, bound, good in rows(case, found):
            print(f"{name}, {what}: {sparse} beside {dense}, {ratio}", file=sys.stderr, flush=True)
            table.add_row(name if what == "bytes" else "", what, sparse, dense, ratio, bound)
            kept &= good
        table.add_section()
    console = Console(width=140)
    console.print(table)
    threads = f"{torch.get_num_threads()} CPU threads"
    console.print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, {threads}")
    sys.exit(not kept)


if __name__ == "__main__":
    main()
