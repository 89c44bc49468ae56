"""sensitivity(): every layer alone, the model exactly as it was, and ratios that a recipe takes."""

import json
import math

import pytest
import torch
import yaml
from matplotlib.image import imread
from rich.console import Console
from torch import nn

import hfprune
from hfprune import PruningConfig
from hfprune.errors import ConfigError, ModelError
from tests.analysis.models import OneWidth
from tests.support.models import TINY


def state(model):
    """Everything of a model that could change: objects, values, modes."""
    values = {name: (id(value), value.clone()) for name, value in model.named_parameters()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    return values, buffers, {name: module.training for name, module in model.named_modules()}


def same(model, before):
    values, buffers, modes = before
    assert all(id(v) == values[n][0] and torch.equal(v, values[n][1]) for n, v in model.named_parameters())
    assert all(torch.equal(v, buffers[n]) for n, v in model.named_buffers())
    assert {name: module.training for name, module in model.named_modules()} == modes


def left_of_first(model):
    return {"left": float((model.first.weight != 0).float().mean())}


def test_figures_by_hand():
    model = TINY["mlp"].build()
    ratios = (0.25, 0.5, 0.75)
    found = hfprune.sensitivity(
        model, left_of_first, metric="left", ratios=ratios, granularity="weight", tolerance=0.5, greater_is_better=True
    )
    assert found.dense == 1
    assert found.layers["first.weight"].values == (0.75, 0.5, 0.25)
    assert found.layers["first.weight"].pruned == (24, 48, 72) and found.layers["first.weight"].units == 96
    assert found.layers["last.weight"].values == (1, 1, 1)
    assert [entry.chosen for entry in found.layers.values()] == [0.5, 0.75]
    assert found.ratio == (48 + 36) / (96 + 48)
    assert found.per_layer == {"first.weight": 0.5, "last.weight": 0.75}


@pytest.mark.parametrize(
    ("values", "greater", "tolerance", "chosen"),
    [
        ((0.99, 0.5, 0.99), True, 0.02, 0.2),  # a ratio behind one that fails is never chosen
        ((0.97, 1.0, 1.0), True, 0.02, 0.0),
        ((1.5, 1.01, 1.0), True, 0.0, 0.6),  # better is no drop
        ((1.02, 1.019, 1.03), False, 0.02, 0.4),
        ((1.0, math.nan, 1.0), True, 0.5, 0.2),
    ],
)
def test_the_rule(values, greater, tolerance, chosen):
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 5, bias=False)

    by_zeros = dict(zip((0, 4, 8, 12), (1.0, *values), strict=True))

    def evaluate(model):
        return by_zeros[int((model.layer.weight == 0).sum())]

    found = hfprune.sensitivity(
        One(),
        evaluate,
        metric="m",
        greater_is_better=greater,
        ratios=(0.6, 0.2, 0.4),
        granularity="weight",
        tolerance=tolerance,
    )
    assert found.ratios == (0.2, 0.4, 0.6) and found.layers["layer.weight"].chosen == chosen
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("name", ["cnn", "vit", "gpt2", "llama", "timm_resnet"])
@pytest.mark.parametrize("granularity", ["channel", "weight"])
def test_the_model_is_exactly_as_it_was(name, granularity):
    tiny = TINY[name]
    model = tiny.build().train()
    before = state(model)
    found = hfprune.sensitivity(model, data=tiny.batch(), ratios=(0.3, 0.6), granularity=granularity)
    same(model, before)
    assert found.metric == "loss" and not found.greater_is_better
    values = [value for entry in found.layers.values() for value in entry.values]
    assert all(value is not None for value in values) and any(value != found.dense for value in values)


@pytest.mark.parametrize("granularity", ["channel", "weight", "block:2x2"])
def test_an_evaluation_that_fails_leaves_the_model_as_it_was(granularity):
    tiny = TINY["cnn"]
    model = tiny.build().train()
    before = state(model)
    calls = []

    def evaluate(model):
        calls.append(sum(int((p != 0).sum()) for p in model.parameters()))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        hfprune.sensitivity(
            model, evaluate, metric="m", granularity=granularity, data=tiny.batch(), ratios=(0.3, 0.6, 0.8)
        )
    assert min(calls) < calls[0]
    same(model, before)


@pytest.mark.parametrize("name, granularity", [("cnn", "channel"), ("cnn", "weight"), ("vit", ["head", "neuron"]),
                                               ("llama", "channel"), ("vit", "weight")])  # fmt: skip
@pytest.mark.parametrize("tolerance", [0.002, 10.0])
def test_the_yaml_feeds_back(name, granularity, tolerance):
    tiny = TINY[name]
    model = tiny.build()
    found = hfprune.sensitivity(
        model, data=tiny.batch(), granularity=granularity, tolerance=tolerance, ratios=(0.25, 0.5, 0.75)
    )
    section = yaml.safe_load(found.to_yaml())["pruning"]
    config = PruningConfig(**section)
    report = hfprune.prune(model, config, data=tiny.batch())
    chosen = {
        layer: entry.pruned[found.ratios.index(entry.chosen)] if entry.chosen else 0
        for layer, entry in found.layers.items()
    }
    if report.groups:
        assert {layer: units - kept for layer, (units, kept) in report.groups.items()} == chosen
    else:
        assert {layer: entry.zeros for layer, entry in report.masks.sparsity().items()} == chosen
    assert report.achieved == pytest.approx(found.ratio, abs=1e-4)


def test_groups_that_code_cuts_alike_are_cut_together():
    model = OneWidth().eval()
    data = (torch.randn(8, 3, 4), torch.randint(0, 3, (8,)))
    before = state(model)
    found = hfprune.sensitivity(model, data=data, ratios=(0.25, 0.5), tolerance=10)
    same(model, before)
    (entry,) = found.layers.values()
    assert entry.groups == ("embed", "qkv") and (entry.units, entry.pruned) == (16 + 4, (5, 10))
    report = hfprune.prune(model, PruningConfig(**found.pruning()), data=data)
    assert report.groups == {"embed": (16, 8), "qkv": (4, 2)}


def test_only_some_layers():
    tiny = TINY["cnn"]
    model = tiny.build()
    found = hfprune.sensitivity(model, data=tiny.batch(), granularity="weight", ignore=["head"], tolerance=10)
    assert set(found.layers) == {"conv1.weight", "conv2.weight"}
    hfprune.prune(model, PruningConfig(**found.pruning()))
    assert model.head.weight.all() and not model.conv1.weight.all()


def test_a_criterion_with_parameters_goes_into_the_recipe():
    tiny = TINY["cnn"]
    wanted = {"name": "taylor", "absolute": True}
    found = hfprune.sensitivity(tiny.build(), criterion=wanted, data=tiny.batch(), ratios=[0.5])
    assert PruningConfig(**yaml.safe_load(found.to_yaml())["pruning"]).criterion == wanted


def test_report(tmp_path):
    tiny = TINY["cnn"]
    seen = []
    found = hfprune.sensitivity(
        tiny.build(), data=tiny.batch(), ratios=(0.25, 0.75), progress=lambda *told: seen.append(told)
    )
    assert seen[0] == ("dense", 0, 5) and seen[-1] == ("conv2", 4, 5)
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["ratios"] == [0.25, 0.75] and set(values["layers"]) == {"conv1", "conv2"}
    assert set(values["layers"]["conv1"]) == {"units", "pruned", "values", "chosen", "groups"}
    assert PruningConfig(**values["pruning"]).granularity == "channel"
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found.table())
    text = console.export_text()
    assert "conv1" in text and "0.75" in text and "chosen" in text
    picture = imread(found.plot(tmp_path / "s.png"))
    assert picture.shape[1] > 400 and picture.std() > 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": ()}, "ratios: give one or more"),
        ({"ratios": (0.5, 1.0)}, "ratios: 1.0 must lie between 0 and 1"),
        ({"tolerance": -1}, "tolerance: -1 must be 0 or more"),
        ({"criterion": "l3"}, "unknown criterion 'l3'"),
        ({"data": None}, "evaluate: nothing to measure with"),
        ({"evaluate": lambda model: {"loss": 1.0}, "metric": "accuracy"}, "metric: 'accuracy' is not among"),
        ({"granularity": "layer"}, "granularity: 'layer' has no units"),
    ],
)
def test_bad_input_is_one_line(options, message):
    tiny = TINY["cnn"]
    with pytest.raises(ConfigError) as caught:
        hfprune.sensitivity(tiny.build(), **{"data": tiny.batch()} | options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_dense_metric_that_is_no_number():
    with pytest.raises(ModelError, match="the dense model's m is nan"):
        hfprune.sensitivity(TINY["cnn"].build(), lambda model: math.nan, metric="m", granularity="weight")
