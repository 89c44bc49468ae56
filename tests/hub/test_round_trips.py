"""Every kind of checkpoint: pushed here, pulled in a fresh process with an empty cache, and the same logits there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

import hfprune
from hfprune import PruningConfig
from tests.support.hub import TOKEN
from tests.support.models import TINY, logits

ROOT = Path(__file__).parents[2]
HEADS = ["head", "neuron"]


@dataclass
class Kind:
    """How a tiny model is pruned and saved, and which ways of loading must give it back."""

    model: str
    pruning: dict[str, Any]
    ways: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


UNEVEN, UNIFORM = {"granularity": HEADS, "target": 0.4}, {"granularity": "neuron", "scope": "layer", "target": 0.5}
MASKED, HALVES = {"target": 0.5}, {"granularity": "2:4"}
KINDS = {
    "vit-masked": Kind("vit", MASKED, ("transformers", "hfprune")),
    "vit-bitmask": Kind("vit", MASKED, ("transformers", "hfprune"), {"sparse": "bitmask"}),
    "vit-uneven": Kind("vit", UNEVEN, ("transformers", "hfprune")),
    "vit-uniform": Kind("vit", UNIFORM, ("transformers", "hfprune")),
    "bert-masked": Kind("bert", MASKED, ("transformers", "hfprune")),
    "bert-uniform": Kind("bert", UNIFORM, ("transformers", "hfprune")),
    "bert-uneven": Kind("bert", UNEVEN, ("transformers", "hfprune")),
    "llama-masked": Kind("llama", HALVES, ("transformers", "hfprune"), {"max_shard_size": "8KB"}),
    "llama-sparse": Kind("llama", HALVES, ("transformers", "hfprune"), {"sparse": "bitmask", "max_shard_size": "8KB"}),
    "llama-uneven": Kind("llama", UNEVEN, ("transformers", "hfprune"), {"max_shard_size": "8KB"}),
    "llama-uniform": Kind("llama", UNIFORM, ("transformers", "hfprune")),
    "timm-vit-masked": Kind("timm_vit", MASKED, ("timm", "transformers", "hfprune")),
    "timm-vit-uneven": Kind("timm_vit", UNEVEN, ("transformers", "hfprune")),
    "timm-resnet-masked": Kind("timm_resnet", MASKED, ("timm", "transformers", "hfprune")),
    "timm-resnet-uneven": Kind("timm_resnet", {"granularity": "channel", "target": 0.3}, ("transformers", "hfprune")),
    "own-masked": Kind("cnn", MASKED, ("own",)),
    "own-smaller": Kind("cnn", {"granularity": "channel", "target": 0.5}, ("own",)),
}

CHILD = """
import json, sys
import timm, torch, transformers
from safetensors.torch import load_file
import hfprune
from tests.support.models import TINY, logits

kinds, expected = json.loads(sys.argv[1]), load_file(sys.argv[2])
for name, (tiny, kind, ways) in kinds.items():
    repo = f"user/{name}"
    for way in ways:
        if way == "transformers":
            model = getattr(transformers, kind).from_pretrained(repo, revision="v1").eval()
        elif way == "timm":
            model = timm.create_model(f"hf-hub:{repo}@v1", pretrained=True).eval()
        else:
            model = hfprune.from_pretrained(repo, TINY[tiny].build if way == "own" else None, revision="v1")
        same = torch.equal(logits(model, TINY[tiny].batch()), expected[name])
        print(name, way, "same" if same else "DIFFERENT")
"""


CLASSES = {"bert": "AutoModelForSequenceClassification", "llama": "AutoModelForCausalLM"}


def test_every_kind_comes_back_from_the_hub_in_a_fresh_process(hub, tmp_path):
    expected, asked = {}, {}
    for name, kind in KINDS.items():
        tiny = TINY[kind.model]
        model = tiny.build().eval()
        hfprune.prune(model, PruningConfig(**kind.pruning), tiny.batch())
        hfprune.save_pretrained(model, tmp_path / name, **kind.options)
        files = list((tmp_path / name).glob("*.safetensors"))
        assert len(files) > 1 or "max_shard_size" not in kind.options
        hfprune.push_to_hub(tmp_path / name, f"user/{name}", tag="v1")
        expected[name] = logits(model, tiny.batch()).contiguous()
        asked[name] = (kind.model, CLASSES.get(kind.model, "AutoModelForImageClassification"), kind.ways)
    save_file(expected, tmp_path / "expected.safetensors")
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(asked), str(tmp_path / "expected.safetensors")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | settings | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ways = [f"{name} {way} same" for name, kind in KINDS.items() for way in kind.ways]
    assert [line for line in done.stdout.splitlines() if line] == ways
    assert not list(tmp_path.rglob("home/**/*.py"))
