"""Time and memory of the structural engine, as ratios: every contender's every run in a process of its own, by turns.

Memory is what the process's resident set grew by at its highest, from just before the call, when the model was loaded;
a tiny model goes through the same call first, so that the loading of code is not counted (Linux).
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from structure_rows import PIXELS, Row, vit_base
from torch import nn

import hfprune
from hfprune import PruningConfig
from hfprune.structure.groups import analyse
from hfprune.structure.surgery import Journal, cut, kept_indices

Act = Callable[[nn.Module, dict[str, torch.Tensor]], object]


def cut_by_hfprune(model: nn.Module, inputs: dict[str, torch.Tensor]) -> object:
    """Groups, scores, removes half of every group, and proves it."""
    config = PruningConfig(granularity="channel", target=0.5, scope="layer")
    return hfprune.prune(model, config, example_inputs=inputs)


def cut_alone(model: nn.Module, inputs: dict[str, torch.Tensor]) -> object:
    """Groups and cuts half of every group, as the peer does: no proof, no attributes, no record."""
    structure = analyse(model, inputs)
    gone = structure.gone({name: torch.arange(group.units // 2) for name, group in structure.groups.items()})
    return cut(model, kept_indices(structure, gone), Journal())


def group_by_hfprune(model: nn.Module, inputs: dict[str, torch.Tensor]) -> object:
    """Groups alone."""
    return analyse(model, inputs)


def cut_by_peer(model: nn.Module, inputs: dict[str, torch.Tensor]) -> object:
    """Torch-Pruning: groups, scores, removes half of every group; it proves nothing."""
    from structure_peer import peer_pruner

    return peer_pruner(model, inputs, lambda output: output.logits.sum()).step()


CONTENDERS: dict[str, Act] = {
    "hfprune": cut_by_hfprune,
    "grouping": group_by_hfprune,
    "cut": cut_alone,
    "peer": cut_by_peer,
}


def vit_run(contender: str) -> Row:
    """Seconds of processor time (others' load counts in any other), and bytes above the loaded model."""
    torch.manual_seed(0)
    act = CONTENDERS[contender]
    small = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=10
    )
    act(transformers.ViTForImageClassification(small).eval(), PIXELS)
    model = vit_base().eval()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    _forget_peak()
    before = _resident("VmRSS")
    began = time.process_time()
    act(model, PIXELS)
    seconds = time.process_time() - began
    return Row(cells={"seconds": str(seconds), "extra": str((_resident("VmHWM") - before) / size)})


def _forget_peak() -> None:
    """Sets the highest resident size of this process to the present one."""
    Path("/proc/self/clear_refs").write_text("5")


def _resident(key: str) -> int:
    """Bytes: VmRSS now, VmHWM at the highest."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def billion_run(_: str) -> Row:
    """Seconds to group a Llama of 1.2 billion parameters that has no values."""
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128_256, tie_word_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    params = sum(p.numel() for p in model.parameters())
    began = time.perf_counter()
    structure = analyse(model, {"input_ids": torch.ones(1, 128, dtype=torch.long)})
    seconds = time.perf_counter() - began
    row = Row(ok=seconds < 60)
    row.cells = {
        "what": f"grouping a Llama of {params / 1e9:.2f} billion parameters (bfloat16, on the meta device)",
        "hfprune": f"{seconds:.1f} s, {len(structure.groups)} groups",
        "bound": "under a minute",
    }
    heads = sum(group.units for group in structure.groups.values() if group.kind == "head")
    if heads != 16 * 8:
        row.fail(f"{heads} heads found, not {16 * 8}")
    return row


def speed_rows(isolated: Callable[..., Row], options: argparse.Namespace) -> Iterator[Row]:
    """All rows of the table."""
    runs: dict[str, list[Row]] = {name: [] for name in CONTENDERS if name != "peer" or options.peer}
    for _ in range(options.runs):
        for name, rows in runs.items():
            rows.append(isolated(vit_run, name, options.limit, "spawn"))
    failed = [row for rows in runs.values() for row in rows if not row.ok]
    if failed:
        yield Row(False, {"what": "ViT-B/16"}, failed[0].reason)
        return
    seconds, extra = ({name: statistics.median(float(row.cells[key]) for row in rows) for name, rows in runs.items()}
                      for key in ("seconds", "extra"))  # fmt: skip
    time_row = Row(cells={"what": "half of a ViT-B/16: groups, scores, cut and proof"})
    time_row.cells["hfprune"] = f"{seconds['hfprune']:.1f} CPU s, of it {seconds['grouping']:.1f} s for the groups"
    if "peer" in seconds:
        time_row.cells["beside"] = f"{seconds['peer']:.1f} CPU s  Torch-Pruning, no proof"
        time_row.cells["ratio"] = f"{seconds['hfprune'] / seconds['peer']:.2f}x its time"
    yield time_row
    cut_row = Row(cells={"what": "groups and cut alone", "hfprune": f"{seconds['cut']:.1f} CPU s"})
    cut_row.cells["bound"] = "no longer than the peer"
    if "peer" in seconds:
        cut_row.cells["beside"] = f"{seconds['peer']:.1f} CPU s  Torch-Pruning"
        cut_row.cells["ratio"] = f"{seconds['cut'] / seconds['peer']:.2f}x its time"
        cut_row.ok = seconds["cut"] <= seconds["peer"]
    yield cut_row
    total = 1 + extra["hfprune"]
    memory = Row(total <= 1.5, {"what": "its peak memory, the model included", "bound": "at most 1.5x the model"})
    memory.cells["hfprune"] = f"{total:.2f}x the model"
    if "peer" in extra:
        memory.cells |= {"beside": f"{1 + extra['peer']:.2f}x the model"}
    memory.cells["ratio"] = f"groups alone {1 + extra['grouping']:.2f}x"
    yield memory
    yield isolated(billion_run, "", options.limit, "spawn")
