"""What pruning costs as a model grows: seconds, memory and bytes moved of every stage, in one process and in several.

python scripts/bench_scale.py [--sizes 10M 100M 1B] [--processes 1 2 4] [--train 10M 100M]

A random Llama-like model (float32) is made in its parts, as FSDP2 deals them out; in one process it is whole. Processes
have one thread each and exchange by gloo on this machine's CPUs, so that seconds on the clock mean little where they
share cores: growth is fitted to the processor seconds of all of them together. Each stage runs once for its peak memory
and the bytes that it moves, and then for its seconds (medians). Memory is the most that one process held above what it
held with the model alone; bytes are those of the tensors that are added up or gathered, in one process's hands. `step`
is one of AdamW on one sequence of 16 tokens a process. Linux only.

glibc holds on to blocks that were freed, which counts as memory: MALLOC_MMAP_THRESHOLD_=262144 in the environment gives
them back at once, so that peaks are those of what is held; seconds are then longer.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from hfprune import PruningConfig
from hfprune.masks import MaskSet, ShardedMaskSet
from hfprune.profiling import human_bytes
from hfprune.pruner import Pruner
from hfprune.sharded import ShardedPruner
from hfprune.sharding import AcrossProcesses, local

SIZES = {"1M": (128, 5, 3), "10M": (384, 6, 5), "100M": (768, 14, 2), "1B": (2048, 20, 1)}
"""Hidden size, layers, and how often a stage is timed."""

STAGES = ("score", "select", "apply", "enforce", "save masks", "masked step", "step")
TOKENS = 16
VOCABULARY = 512
MOVING = {"allreduce_": 0, "allgather_": 0, "_allgather_base_": 0, "_reduce_scatter_base_": 1, "broadcast_": 0}
"""Of the operations that move bytes, the argument that is whole in each process."""
MOVING |= {"all_gather_into_tensor": None}


class Moved(TorchDispatchMode):
    """Counts the bytes of the tensors that processes add up, gather or deal out."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        found = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")
        if name[0] in ("c10d", "_c10d_functional") and name[1] in MOVING:
            self.bytes += _size(found if MOVING[name[1]] is None else args[MOVING[name[1]]])
        return found


def _size(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_size(part) for part in value)


def memory(key: str) -> int:
    """A line of the process's status in bytes: `VmRSS` now, `VmHWM` at its peak since `settle`."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def settle(across: AcrossProcesses | None) -> None:
    """Gives back what is free, waits for the others, and lets the peak count from now on."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    if across is not None:
        dist.barrier()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def build(size: str, across: AcrossProcesses | None) -> tuple[LlamaForCausalLM, Pruner]:
    """The model with random weights, never whole in one of several processes, and its pruner."""
    hidden, layers, _ = SIZES[size]
    inner = math.ceil(8 * hidden / 3 / 64) * 64
    config = LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, vocab_size=VOCABULARY)
    config.num_attention_heads = config.num_key_value_heads = hidden // 64
    config.head_dim = 64
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    pruning = PruningConfig(criterion="l1", target=0.5)
    pruner = None if across is None else ShardedPruner(model, pruning, across)
    if across is not None:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    torch.manual_seed(0 if across is None else dist.get_rank())
    with torch.no_grad():
        for parameter in model.parameters():
            local(parameter).normal_(std=0.02) if parameter.ndim > 1 else local(parameter).fill_(1)
    if pruner is None:
        return model, Pruner(model, pruning)
    pruner.follow(model)
    return model, pruner


class Bench:
    """The stages over one model, in this process together with the others.

    Args:
        size: of SIZES.
        train: whether there are training steps.
        across: the processes, or None.
        folder: where masks are saved.
    """

    def __init__(self, size: str, train: bool, across: AcrossProcesses | None, folder: Path):
        self.size, self.train, self.across, self.folder = size, train, across, folder
        self.model, self.pruner = build(size, across)
        self.masks = MaskSet({})
        self.found: dict[str, dict[str, float]] = {}

    def run(self) -> dict[str, Any]:
        """The size in numbers, and of all stages the seconds, processor seconds, peak bytes and moved bytes."""
        settle(self.across)
        self.before = memory("VmRSS")
        self._measure("score", self.score)
        self._measure("select", self.select)
        self._measure("apply", lambda: self.masks.apply(self.model))
        self._measure("enforce", self.masks.enforce)
        self._measure("save masks", self.save)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        found = {"parameters": parameters, "weights": self.masks.numel, "pruned": self.masks.zeros}
        if self.train:
            self._steps()
        return found | {"stages": self.found}

    def score(self) -> None:
        """Looks at every score once."""
        for layer in self.pruner.layer_scores():
            for _ in layer.chunks(torch.float32):
                pass

    def select(self) -> None:
        """Half of all weights, globally."""
        self.masks = MaskSet({})
        self.masks = self.pruner.select(0.5)

    def save(self) -> None:
        """The masks as a checkpoint holds them, written by the first process."""
        first = self.across is None or dist.get_rank() == 0
        masks = self.masks.joined(first) if isinstance(self.masks, ShardedMaskSet) else self.masks
        if first:
            save_file(masks.state_dict(), self.folder / "masks.safetensors")

    def _steps(self) -> None:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        ids = torch.randint(VOCABULARY, (1, TOKENS))

        def step() -> None:
            self.model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            self.masks.enforce()
            optimizer.zero_grad()

        self._measure("masked step", step)
        self.masks = MaskSet({})
        self._measure("step", step)
        self.found["step"]["peak"] = math.nan  # what FSDP keeps from the steps before it would be missing

    def _measure(self, name: str, act: Callable[[], object]) -> None:
        settle(self.across)
        with Moved() as moved:
            act()
        peak = memory("VmHWM") - self.before
        walls, seconds = [], []
        for _ in range(SIZES[self.size][2]):
            settle(self.across)
            wall, used = time.perf_counter(), time.process_time()
            act()
            walls.append(time.perf_counter() - wall)
            seconds.append(time.process_time() - used)
        largest = torch.tensor([statistics.median(walls), peak, moved.bytes], dtype=torch.float64)
        added = torch.tensor([statistics.median(seconds)], dtype=torch.float64)
        if self.across is not None:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            dist.all_reduce(added)
        wall, peak, bytes_moved = largest.tolist()
        self.found[name] = {"seconds": wall, "processor": added.item(), "peak": peak, "moved": bytes_moved}


def worker(sizes: list[str], train: list[str], answer: Path) -> None:
    """One of the processes; the first writes what was measured."""
    torch.set_num_threads(1)
    across = None
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        across = AcrossProcesses(torch.device("cpu"))
    Bench("1M", True, across, answer.parent).run()  # loads code, which is not counted
    answers = {}
    for size in sizes:
        bench = Bench(size, size in train, across, answer.parent)
        answers[size] = bench.run()
        del bench
    if across is None or dist.get_rank() == 0:
        answer.write_text(json.dumps(answers), encoding="utf-8")
    if across is not None:
        dist.barrier()
        dist.destroy_process_group()


def measure(sizes: list[str], processes: int, train: list[str]) -> dict[str, dict[str, Any]]:
    """Starts the processes, and gives what they measured of each size."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = command if processes > 1 else [sys.executable]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        flags = ["--worker", str(answer), "--sizes", *sizes, "--train", *train]
        done = subprocess.run([*command, __file__, *flags], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{processes} processes failed:\n{done.stderr[-4000:]}")
        return json.loads(answer.read_text(encoding="utf-8"))


def exponent(parameters: list[float], seconds: list[float]) -> float:
    """The b of seconds = a * parameters^b, by least squares over the logarithms."""
    x, y = ([math.log(value) for value in values] for values in (parameters, seconds))
    return statistics.linear_regression(x, y).slope


def row(name: str, processes: int, found: dict[str, dict[str, Any]]) -> list[str]:
    """A stage's line of the table, over the sizes."""
    cells, points = [name], []
    for answer in found.values():
        stage = answer["stages"].get(name)
        if stage is None:
            cells += ["–"] * (4 if processes > 1 else 3)
            continue
        peak = "–" if math.isnan(stage["peak"]) else human_bytes(max(0, stage["peak"]))
        moved = [human_bytes(stage["moved"])] if processes > 1 else []
        cells += [f"{stage['seconds']:.3g}", f"{stage['processor']:.3g}", peak, *moved]
        points.append((answer["parameters"], stage["processor"], stage["peak"] * processes))
    if not points:
        return [*cells, "–", "–", "–"]
    size, seconds, peak = points[-1]
    slope = f"{exponent([p[0] for p in points], [p[1] for p in points]):.2f}" if len(points) > 1 else "–"
    each = "–" if math.isnan(peak) else f"{max(0, peak) / size:.2f}"
    return [*cells, slope, f"{seconds / size * 1e9:.2f}", each]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["10M", "100M", "1B"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--train", nargs="*", choices=SIZES, default=["10M", "100M"], help="sizes that train a step")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.sizes, options.train, options.worker)
        return
    console, began = Console(width=170), time.perf_counter()
    for processes in options.processes:
        found = measure(options.sizes, processes, options.train)
        headings = ["processor", "peak", "moved"] if processes > 1 else ["processor", "peak"]
        table = Table(title=f"{processes} process{'es' if processes > 1 else ''}", title_justify="left")
        table.add_column("stage", no_wrap=True)
        for heading in [heading for size in found for heading in (size, *headings)]:
            table.add_column(heading, justify="right")
        for heading in ("exponent", "ns each", "bytes each"):
            table.add_column(heading, justify="right")
        for name in STAGES:
            table.add_row(*row(name, processes, found))
        console.print(table)
        for size, answer in found.items():
            print(f"{size}: {answer['parameters']:,} parameters, {answer['pruned']:,} of {answer['weights']:,} pruned")
    print("under a size: seconds, the processor seconds of all processes, the peak of one, the bytes moved in one")
    print(
        "exponent: b of processor seconds = a * parameters^b; each: of all processes, a parameter of the largest size"
    )
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores"
    )
    print(f"load {os.getloadavg()[0]:.1f}, {time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
