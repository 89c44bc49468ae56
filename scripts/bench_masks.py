"""What masks cost, as ratios taken in one run: masked fine-tuning, exact global selection, and importing hfprune.

python scripts/bench_masks.py [--weights 100_000_000] [--steps 100]

Speeds are medians of several interleaved runs on this machine. Peak memory is that of a process of its own for each
contender, so that what one allocates is not counted for another.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

LAYERS = 10


def layers_of(count: int) -> nn.Module:
    """`count` weights in ten linear layers."""
    torch.manual_seed(0)
    width = count // LAYERS // 1000
    return nn.Sequential(*(nn.Linear(1000, width, bias=False) for _ in range(LAYERS)))


def select_hfprune(model: nn.Module) -> Callable[[], object]:
    """Exact global L1 selection of 80 %, masks included."""
    from hfprune import PruningConfig
    from hfprune.pruner import Pruner

    pruner = Pruner(model, PruningConfig(criterion="l1", target=0.8))
    return lambda: pruner.select(0.8)


def select_torch(model: nn.Module) -> Callable[[], object]:
    """The same by torch.nn.utils.prune."""
    from torch.nn.utils import prune

    parameters = [(module, "weight") for module in model]
    return lambda: prune.global_unstructured(parameters, pruning_method=prune.L1Unstructured, amount=0.8)


def _peak(contender: str, count: int, answer: multiprocessing.Queue) -> None:
    contenders = {"hfprune": select_hfprune, "torch": select_torch}
    # The first call loads code; a small one of it is not counted.
    contenders[contender](layers_of(100_000))()
    model = layers_of(count)
    act = contenders[contender](model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    kept = act()
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    zeros = kept.zeros if contender == "hfprune" else sum(int((~m.weight_mask.bool()).sum()) for m in model)
    answer.put((seconds, peak * 1024, zeros))


def selection(count: int, runs: int) -> list[tuple[str, ...]]:
    """Time and extra peak memory of selecting 80 % of `count` weights, by turns."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[tuple[float, int, int]]] = {"hfprune": [], "torch": []}
    for _ in range(runs):
        for contender, results in found.items():
            answer = context.Queue()
            process = context.Process(target=_peak, args=(contender, count, answer))
            process.start()
            results.append(answer.get())
            process.join()
    seconds = {name: statistics.median(r[0] for r in results) for name, results in found.items()}
    memory = {name: statistics.median(r[1] for r in results) for name, results in found.items()}
    copy = 4 * count
    return [
        (
            f"select 80 % of {count:,} weights, global L1",
            f"{seconds['hfprune']:.2f} s",
            f"{seconds['torch']:.2f} s  torch.nn.utils.prune",
            f"{seconds['torch'] / seconds['hfprune']:.1f}x faster",
            "at least 8x",
        ),
        (
            "its extra peak memory, masks included",
            f"{memory['hfprune'] / 1e6:.0f} MB",
            f"{memory['torch'] / 1e6:.0f} MB",
            f"{memory['hfprune'] / copy:.2f} of a copy of the weights",
            "at most 0.5",
        ),
        (
            "units selected",
            f"{found['hfprune'][0][2]:,}",
            f"{found['torch'][0][2]:,}",
            f"{found['hfprune'][0][2] - round(0.8 * count):+,} from what was asked",
            "0",
        ),
    ]


class _Images(torch.utils.data.Dataset):
    def __init__(self, count: int):
        torch.manual_seed(1)
        self.images = torch.randn(count, 3, 64, 64)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, object]:
        return {"pixel_values": self.images[index], "labels": index % 10}


def _timed_steps(steps: int) -> tuple[list[float], list[float]]:
    """Seconds of each optimizer step of a ViT-Tiny-sized model in one trainer, with masks held and without, by turns.

    Steps of the two kinds follow one another in one run, so that what else the machine does falls on both alike.
    """
    from transformers import TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

    from hfprune import PruningTrainer
    from hfprune.masks import MaskSet

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768)
    config.image_size, config.patch_size, config.num_labels = 64, 8, 10
    times: dict[bool, list[float]] = {True: [], False: []}
    held: list[MaskSet] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            held[:] = held or [trainer.masks]
            trainer.masks = held[0] if state.global_step % 2 else MaskSet({})
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            times[len(trainer.masks) > 0].append(time.perf_counter() - self.began)
            trainer.masks = held[0]

    arguments = TrainingArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=8, max_steps=2 * steps, use_cpu=not torch.cuda.is_available(),
        save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = PruningTrainer(
        model=ViTForImageClassification(config), args=arguments, train_dataset=_Images(256),
        pruning={"target": 0.8, "recovery": {"steps": 2 * steps}}, callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    return times[True][1:], times[False][1:]


def training(steps: int) -> list[tuple[str, ...]]:
    """The median step with masks over the median step without, and the enforcement alone."""
    with_masks, without = _timed_steps(steps)
    dense, masked = statistics.median(without), statistics.median(with_masks)
    pairs = statistics.median(a / b for a, b in zip(with_masks, without, strict=False))
    enforce = _enforcement()
    return [
        (
            f"masked fine-tuning, ViT-Tiny size, {steps} steps each",
            f"{masked * 1e3:.1f} ms a step",
            f"{dense * 1e3:.1f} ms  without masks, by turns",
            f"{(pairs - 1) * 100:+.1f} %",
            "at most +3 %",
        ),
        (
            "holding the masks at zero, alone",
            f"{enforce * 1e3:.2f} ms a step",
            f"{dense * 1e3:.1f} ms a step",
            f"{enforce / dense * 100:.1f} %",
            "at most 3 %",
        ),
    ]


def _enforcement() -> float:
    from transformers import ViTConfig, ViTForImageClassification

    from hfprune import PruningConfig, prune

    config = ViTConfig(hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768)
    masks = prune(ViTForImageClassification(config), PruningConfig(target=0.8)).masks
    seconds = []
    for _ in range(30):
        began = time.perf_counter()
        masks.enforce()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def importing(runs: int) -> list[tuple[str, ...]]:
    """What `import hfprune` adds to importing torch and transformers' quantizer registry."""
    code = (
        "import time, torch, transformers.quantizers.auto; t = time.perf_counter(); import hfprune; "
        "print(time.perf_counter() - t)"
    )
    seconds = [float(subprocess.check_output([sys.executable, "-c", code], text=True)) for _ in range(runs)]
    median = statistics.median(seconds)
    return [
        ("import hfprune, after torch and transformers.quantizers", f"{median * 1e3:.1f} ms", "", "", "under 300 ms")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=100_000_000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    table = Table(title="What masks cost", title_justify="left")
    for column in ("what", "hfprune", "beside", "ratio", "bound"):
        table.add_column(column)
    rows = importing(options.runs) + selection(options.weights, options.runs) + training(options.steps)
    for row in rows:
        table.add_row(*row)
    console = Console(width=160)
    console.print(table)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    console.print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, {device}")


if __name__ == "__main__":
    main()
