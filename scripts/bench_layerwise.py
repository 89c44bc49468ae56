"""Peak memory of pruning a language model layer by layer: a random Llama of a billion parameters, bfloat16, on the CPU.

python scripts/bench_layerwise.py [--criterion sparsegpt wanda] [--blocks 2] [--batches 8] [--tokens 256]

Each criterion runs in a process of its own. Printed are the memory of the process with the model and its data, the peak
while its weights are pruned, and what the peak is made of as far as it can be counted: the masks (one bit a weight),
the hidden states before and after a block, and the sums of products of the widest layer with what inverting them takes.
Only the first `--blocks` blocks are pruned, since the memory does not grow with their number but for the masks, and
the time does; 0 prunes all. Linux only.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from hfprune import PruningConfig
from hfprune.originals import Originals
from hfprune.profiling import human_bytes
from hfprune.pruner import Pruner

SIZES = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
HEADS = {"num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True}


def memory(key: str) -> int:
    """A line of the process's status in bytes: `VmRSS` now, `VmHWM` at its peak since `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def forget_peak() -> None:
    """Lets the peak count from now on."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def build() -> LlamaForCausalLM:
    """The model with random weights, never held in another precision than bfloat16."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).eval()
    torch.set_default_dtype(torch.float32)
    return model


def contender(criterion: str, options: argparse.Namespace, answers: Any) -> None:
    """Prunes in this process, and puts what was measured into a queue."""
    model = build()
    g = torch.Generator().manual_seed(0)
    data = [
        {"input_ids": torch.randint(HEADS["vocab_size"], (options.batch_size, options.tokens), generator=g)}
        for _ in range(options.batches)
    ]
    include = [f"model.layers.{number}" for number in range(options.blocks)] or None
    config = PruningConfig(
        criterion={"name": criterion, "batches": options.batches}, target=0.5, scope="layer", include=include
    )
    pruner = Pruner(model, config)
    before = memory("VmRSS")
    forget_peak()
    began = time.perf_counter()
    with Originals() as originals:
        masks = pruner.visit(0.5, None, originals, data=data)
        seconds = time.perf_counter() - began
        peak = memory("VmHWM")
    width = SIZES["intermediate_size"]
    answers.put(
        {
            "criterion": criterion,
            "parameters": sum(p.numel() for p in model.parameters()),
            "pruned": masks.zeros / masks.numel,
            "seconds": seconds,
            "model": sum(p.numel() * p.element_size() for p in model.parameters()),
            "before": before,
            "peak": peak,
            "masks": masks.numel // 8,
            "states": 2 * 2 * options.batches * options.batch_size * options.tokens * SIZES["hidden_size"],
            "sums": width * width * 4 if criterion == "sparsegpt" else 0,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--criterion", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--blocks", type=int, default=2, help="blocks to prune; 0 prunes all")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    table = Table(title="memory of the process")
    for heading in ("criterion", "model", "before", "peak", "above", "masks", "hidden states", "sums, each", "seconds"):
        table.add_column(heading, justify="left" if heading == "criterion" else "right")
    context = multiprocessing.get_context("spawn")
    for criterion in options.criterion:
        answers = context.Queue()
        process = context.Process(target=contender, args=(criterion, options, answers))
        process.start()
        found = answers.get()
        process.join()
        above = found["peak"] - found["before"]
        numbers = (
            found["model"],
            found["before"],
            found["peak"],
            above,
            found["masks"],
            found["states"],
            found["sums"],
        )
        table.add_row(criterion, *(human_bytes(n) for n in numbers), f"{found['seconds']:.0f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
