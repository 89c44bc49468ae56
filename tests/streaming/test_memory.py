"""The bound on memory that is said before a streamed pruning holds, for a model that is larger than it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]

CODE = """
import json, sys
import torch
import hfprune
from hfprune.streaming.source import Source

def memory(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

torch.set_num_threads(1)
small, source, output, options = *sys.argv[1:4], json.loads(sys.argv[4])
data = [{"input_ids": torch.randint(64, (2, 32))} for _ in range(3)]
config = hfprune.PruningConfig(**options)
whole = hfprune.PruningConfig(**{name: value for name, value in options.items() if name != "include"})
hfprune.prune_checkpoint(small, output + "-small", whole, data)  # what libraries take at their first use
Source.open(source)
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
report = hfprune.prune_checkpoint(source, output, config, data)
print(json.dumps([memory("VmHWM") - before, report.bound.peak, report.bound.total]))
"""

SOME = [f"model.layers.{number}" for number in range(0, 120, 30)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """120 equal layers in four shards, never in memory together; beside it a `small` one of one layer."""
    small = tmp_path_factory.mktemp("small")
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "vocab_size": 64}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).bfloat16().save_pretrained(small)
    shutil.copytree(small, folder, dirs_exist_ok=True)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    (folder / "model.safetensors").unlink()
    layer = {name: value for name, value in model.items() if ".layers.0." in name}
    weight_map = {}
    for shard in range(4):
        tensors = {} if shard else {name: value for name, value in model.items() if name not in layer}
        for number in range(30 * shard, 30 * shard + 30):
            tensors |= {name.replace(".0.", f".{number}."): value.clone() for name, value in layer.items()}
        file = f"model-{shard + 1:05}-of-00004.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 120}))
    return small, folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux")
@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "l1", "target": 0.5},
        {"criterion": "wanda", "target": 0.5, "include": SOME},
    ],
)
def test_the_bound_holds(checkpoint, options, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CODE, *map(str, checkpoint), str(tmp_path / "out"), json.dumps(options)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    peak, bound, total = json.loads(done.stdout.splitlines()[-1])
    assert peak <= bound < total
