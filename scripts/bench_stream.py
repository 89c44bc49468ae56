"""Peak memory of pruning a checkpoint from files to files: a random Llama of one gigabyte in shards, bfloat16, CPU.

python scripts/bench_stream.py [--way l1 wanda sparsegpt neuron layer] [--layers 30] [--tokens 256] [--batches 8]

Each way (a criterion of single weights, or a granularity) runs in a process of its own. Printed are the bound that it
says before it starts, the peak of the process's memory above what it had just before (the libraries and the example
batches were loaded), and the seconds. The checkpoints lie in a temporary folder, or in `--folder`, and go away at the
end. Linux only.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hfprune
from hfprune.profiling import human_bytes

SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 8}
WORDS = {"vocab_size": 32_000, "tie_word_embeddings": True}


def memory(key: str) -> int:
    """A line of the process's status in bytes: `VmRSS` now, `VmHWM` at its peak since `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def forget_peak() -> None:
    """Lets the peak count from now on."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def build(folder: Path, layers: int, answers: Any) -> None:
    """The checkpoint with random weights, never held in another precision than bfloat16."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **WORDS, num_hidden_layers=layers))
    model.save_pretrained(folder, max_shard_size="200MB")
    answers.put(sum(file.stat().st_size for file in folder.glob("*.safetensors")))


def config_of(way: str, batches: int) -> hfprune.PruningConfig:
    """Half of the weights, neurons or layers."""
    if way in ("neuron", "layer"):
        return hfprune.PruningConfig(granularity=way, target=0.5, scope="layer")
    chosen = {"name": way} if way == "l1" else {"name": way, "batches": batches}
    return hfprune.PruningConfig(criterion=chosen, target=0.5, scope="global" if way == "l1" else "layer")


def contender(folder: Path, way: str, options: argparse.Namespace, answers: Any) -> None:
    """Prunes in this process, and puts what was measured into a queue."""
    g = torch.Generator().manual_seed(0)
    shape = (options.batch_size, options.tokens)
    data = [{"input_ids": torch.randint(WORDS["vocab_size"], shape, generator=g)} for _ in range(options.batches)]
    config = config_of(way, options.batches)
    data = data if config.criterion_name in ("wanda", "sparsegpt") else None
    hfprune.prune_checkpoint, LlamaForCausalLM  # noqa: B018  (imports what it needs)
    output = folder.with_name(way)
    before = memory("VmRSS")
    forget_peak()
    began = time.perf_counter()
    report = hfprune.prune_checkpoint(folder, output, config, data, say=lambda line: None)
    seconds = time.perf_counter() - began
    peak = memory("VmHWM")
    shutil.rmtree(output)
    answers.put({"bound": report.bound.peak, "above": peak - before, "seconds": seconds, "achieved": report.achieved})


def in_a_process(target: Any, *args: Any) -> Any:
    """What a function puts into a queue, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=target, args=(*args, answers))
    process.start()
    found = answers.get()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", nargs="+", default=["l1", "wanda", "sparsegpt", "neuron", "layer"])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--folder", help="where the checkpoints lie in the meantime; by default a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        dense = Path(place) / "dense"
        size = in_a_process(build, dense, options.layers)
        shards = len(list(dense.glob("*.safetensors")))
        print(f"Llama of {human_bytes(size)} in {shards} shards; above the memory at the start, without the libraries:")
        for way in options.way:
            found = in_a_process(contender, dense, way, options)
            bound, above = human_bytes(found["bound"]), human_bytes(found["above"])
            gone = f"{found['achieved']:.2%} gone"
            print(f"{way:10} bound {bound:>8}   peak {above:>8}   {found['seconds']:6.0f} s   {gone}", flush=True)


if __name__ == "__main__":
    main()
