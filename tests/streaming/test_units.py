"""prune_checkpoint with removals: the stock model that hfprune.prune leaves, cut from file to file."""

import json

import pytest
import torch

from hfprune import PruningConfig, prune_checkpoint
from hfprune.errors import ConfigError
from tests.streaming.test_masks import both, equal, saved, silent
from tests.support.models import bert, gpt2, llama, tokens, vit


def four_layers():
    return llama(layers=4)


def structural(granularity, **options):
    return PruningConfig(**{"granularity": granularity, "target": 0.5, "scope": "layer", "round_to": 1} | options)


@pytest.mark.parametrize(
    ("build", "config"),
    [
        (four_layers, structural("neuron")),
        (four_layers, structural("head", criterion="l2")),
        (four_layers, structural("layer")),
        (four_layers, structural(["head", "neuron", "layer"], criterion="random", seed=3)),
        (four_layers, structural("neuron", target={"params": 0.9})),
        (vit, structural(["head", "neuron"])),
        (bert, structural("neuron", ignore=["*pooler*"])),
        (gpt2, structural("layer")),
    ],
)
def test_the_same_as_in_memory(build, config, tmp_path):
    memory, stream, report, streamed = both(build(), tmp_path, config)
    assert equal(memory, stream)
    assert json.loads((memory / "config.json").read_text()) == json.loads((stream / "config.json").read_text())
    assert (streamed.pruned, streamed.units) == (report.pruned, report.units)
    assert streamed.achieved == pytest.approx(report.achieved)
    assert streamed.note == report.note
    model = build().from_pretrained(stream)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in build().parameters())


def test_shards_of_blocks_that_are_gone_are_gone(tmp_path):
    source = saved(four_layers(), tmp_path / "dense")
    prune_checkpoint(source, tmp_path / "out", structural("layer", target=0.75), say=silent)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == set(index["weight_map"].values())
    assert not any(".layers.1." in name for name in index["weight_map"])
    model = four_layers().from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.isfinite(model(**tokens()).logits).all()


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (
            structural("neuron", per_layer={"*.0.*": 0.25}),
            "none that its config can say.*cut all layers alike",
        ),
        (structural("neuron", criterion="taylor"), "'taylor' runs the whole model; with streaming use l1"),
        (structural("layer", criterion="block_influence"), "'block_influence' runs the whole model"),
        (structural("neuron", target={"params": 3000}, schedule={"kind": "geometric", "steps": 2}), "give one_shot"),
        (structural("rank"), "'rank' needs the whole model in memory"),
        (structural("neuron", target={"latency": 0.5}), "what is streamed can't be timed"),
    ],
)
def test_what_is_refused(config, problem, tmp_path):
    source = saved(llama(), tmp_path / "dense")
    with pytest.raises(ConfigError, match=problem):
        prune_checkpoint(source, tmp_path / "out", config, tokens(), say=silent)
    assert not (tmp_path / "out").exists()
