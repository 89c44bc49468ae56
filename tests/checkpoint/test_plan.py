"""Plans from a disk nobody vouches for: only data, only where data was, and one line for all that does not fit."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

import hfprune
from hfprune.checkpoint.metadata import read_block
from hfprune.checkpoint.rebuild import Rebuild, rebuild, unchanged_on_error
from hfprune.errors import CheckpointError
from hfprune.structure.plan import Plan
from tests.support.models import MLP, Convolutions, Recurrent, vit
from tests.support.surgery import SMALL, Blocks, own

MALFORMED = [
    3,
    [],
    {"code": "import os"},
    {"attributes": []},
    {"attributes": {"a": 3}},
    {"attributes": {"a..b": {}}},
    {"attributes": {"a.__class__": {"x": 1}}},
    {"attributes": {"a": {"__class__": 1}}},
    {"attributes": {"a": {"b.c": 1}}},
    {"attributes": {"a": {"b": "text"}}},
    {"attributes": {"a": {"b": True}}},
    {"attributes": {"a": {"b": None}}},
    {"attributes": {"a": {"b": [1.5]}}},
    {"attributes": {"a": {"b": [[1]]}}},
    {"attributes": {"a": {"b": {"c": 1}}}},
    {"attributes": {"a": {"b": math.inf}}},
    {"attributes": {"a": {"b": 10**30}}},
    {"attributes": {"a": {"b": [1] * 100}}},
    {"buffers": {"": {"0": [1]}}},
    {"buffers": {"a": {"x": [1]}}},
    {"buffers": {"a": {"-1": [1]}}},
    {"buffers": {"a": {"0": [-1]}}},
    {"buffers": {"a": {"0": [1, 1]}}},
    {"buffers": {"a": {"0": "1"}}},
    {"dropped": {}},
    {"dropped": [3]},
    {"dropped": ["a.1", "a.1"]},
    {"config": {"quantization_config": {}}},
    {"config": {"auto_map": {"AutoModel": "x.y"}}},
    {"config": {"_private": 1}},
    {"config": {"a b": 1}},
    {"config": {"a": math.nan}},
    {"config": {"a": [[[[[[1]]]]]]}},
    {"dense_config": {"hidden_size": 3}},
]


@pytest.mark.parametrize("values", MALFORMED, ids=lambda values: str(values)[:50])
def test_malformed_plans(values):
    with pytest.raises(CheckpointError) as error:
        Plan.from_dict(values)
    assert str(error.value).startswith("malformed plan: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_there_and_back():
    plan = Plan(
        attributes={"b": {"scaling": 0.125, "heads": 3}, "": {"shape": [4, 2]}},
        buffers={"a.b": {1: [0, 2], 0: [3]}},
        dropped=["a.1", "a.0"],
        config={"x": [1, "y", None], "sub.x": 2},
        dense_config={"x": 3},
    )
    values = json.loads(json.dumps(plan.to_dict()))
    assert Plan.from_dict(values) == plan
    assert values["buffers"] == {"a.b": {"0": [3], "1": [0, 2]}}
    assert Plan.from_dict({}) == Plan()
    assert Plan.from_dict(Plan().to_dict()) == Plan()


@pytest.mark.parametrize(
    "plan",
    [
        {"attributes": {"nowhere": {"x": 1}}},
        {"attributes": {"stem": {"forward": 1}}},
        {"attributes": {"stem": {"weight": 1}}},
        {"attributes": {"stem": {"new": 1}}},
        {"attributes": {"stem": {"training": 1}}},
        {"attributes": {"stem": {"padding_mode": 1}}},
        {"attributes": {"stem": {"_modules": 1}}},
        {"attributes": {"stem": {"out_channels": 1.5}}},
        {"attributes": {"stem": {"out_channels": [1]}}},
        {"attributes": {"": {"window": 3}}},
        {"attributes": {"": {"window": 3.0}}},
        {"buffers": {"shift": {"0": [1]}}},
        {"buffers": {"stem.weight": {"0": [1]}}},
        {"buffers": {"nowhere.gain": {"0": [1]}}},
        {"buffers": {"gain": {"1": [0]}}},
        {"buffers": {"gain": {"0": [8]}}},
        {"dropped": ["stem"]},
        {"dropped": ["blocks.9"]},
        {"dropped": ["blocks"]},
    ],
    ids=lambda plan: str(plan)[:60],
)
def test_plans_that_ask_for_more_than_data(plan):
    model = Blocks()
    facts = {path: dict(vars(module)) for path, module in model.named_modules()}
    with pytest.raises(CheckpointError) as error:
        Rebuild(model, Plan.from_dict(plan))
    assert "\n" not in str(error.value)
    assert facts == {path: dict(vars(module)) for path, module in model.named_modules()}


def shapes_of(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_skeleton_becomes_the_smaller_model(device):
    small = own()
    with torch.device(device):
        model = Blocks()
    changed = rebuild(model, Plan.from_dict(small.hfprune["plan"]), shapes_of(small))
    assert shapes_of(model) == shapes_of(small)
    assert model.depthwise.groups == model.depthwise.in_channels == model.stem.out_channels == 4
    assert (model.norm.num_groups, model.norm.num_channels) == (2, 4)
    assert model.blocks[2].weight is model.blocks[0].weight
    assert len(model.blocks) == 3
    assert model.gain.shape == (4,)
    assert model in changed


@pytest.mark.parametrize(
    "shapes",
    [
        {"stem.weight": (9, 3, 3, 3)},
        {"stem.weight": (4, 3, 3)},
        {"blocks.1.weight": (4, 4), "blocks.3.weight": (5, 4)},
        {"norm.weight": (3,), "norm.bias": (3,)},
    ],
)
def test_shapes_that_do_not_fit(shapes):
    model = Blocks()
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    parameters = list(model.parameters())
    with pytest.raises(CheckpointError), unchanged_on_error(model):
        rebuild(model, Plan(), shapes)
    after = {path: dict(vars(module)) for path, module in model.named_modules()}
    assert {p: {k: v for k, v in d.items() if k[0] != "_"} for p, d in before.items()} == {
        p: {k: v for k, v in d.items() if k[0] != "_"} for p, d in after.items()
    }
    assert all(left is right for left, right in zip(parameters, model.parameters(), strict=True))


def test_a_number_that_contradicts_the_shapes():
    with pytest.raises(CheckpointError, match="the plan's stem.out_channels is 5, but the shapes say 4"):
        rebuild(Blocks(), Plan(attributes={"stem": {"out_channels": 5}}), {"stem.weight": (4, 3, 3, 3)})


def test_sizes_of_torchs_own_layers():
    model = Convolutions()
    shapes = {"transposed.weight": (12, 4, 3, 3), "transposed.bias": (4,), "line.weight": (5, 9, 3), "line.bias": (5,)}
    rebuild(model, Plan(attributes={"grouped": {"groups": 1}}), shapes | {"grouped.weight": (12, 4, 3, 3)})
    assert (model.transposed.in_channels, model.transposed.out_channels) == (12, 4)
    assert (model.line.in_channels, model.line.out_channels) == (9, 5)
    assert (model.grouped.groups, model.grouped.in_channels, model.grouped.out_channels) == (1, 4, 12)
    model = Recurrent()
    half = {n: tuple(s // 2 if n.startswith("lstm") and i == 0 else s for i, s in enumerate(v)) for n, v in
            shapes_of(model).items()}  # fmt: skip
    half |= {name: (12, 3) for name in half if "weight_hh" in name} | {"head.weight": (4, 6)}
    half |= {name: (12, 6) for name in half if "weight_ih_l1" in name}
    rebuild(model, Plan(), half)
    assert model.lstm.hidden_size == 3
    assert model(torch.zeros(2, 5, 8)).shape == (2, 4)
    table = nn.Embedding(8, 6)
    rebuild(table, Plan(), {"weight": (8, 2)})
    assert (table.num_embeddings, table.embedding_dim) == (8, 2)
    norm = nn.LayerNorm(6)
    rebuild(norm, Plan(), {"weight": (2,), "bias": (2,)})
    assert norm.normalized_shape == (2,)


@pytest.fixture
def folder(tmp_path):
    hfprune.save_pretrained(SMALL["llama_rotary"].build(), tmp_path / "small")
    return tmp_path / "small"


def edit(folder, change):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values["hfprune"]["plan"])
    path.write_text(json.dumps(values))


def retouch(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(folder):
    """What plain transformers says to a folder; hfprune's own door says the same or more."""
    with pytest.raises(CheckpointError) as error:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError):
        hfprune.from_pretrained(folder)
    return str(error.value)


@pytest.mark.parametrize(
    ("part", "value", "word"),
    [
        ("attributes", {"model.layers.7": {"x": 1}}, "'model.layers.7'"),
        ("attributes", {"model": {"forward": 1}}, "'model.forward'"),
        ("attributes", {"model.layers.0.self_attn": {"head_dim": "2"}}, "malformed"),
        ("attributes", {"lm_head": {"out_features": 1.5}}, "'lm_head.out_features'"),
        ("buffers", {"model.rotary_emb.inv_freq": {"0": [5]}}, "inv_freq"),
        ("buffers", {"model.norm.weight": {"0": [1]}}, "model.norm.weight"),
        ("dropped", ["model.norm"], "no element"),
        ("dropped", ["model.layers.1"], "holds an unknown"),
        ("dense_config", {}, "does not say what the config's head_dim was"),
        ("dense_config", {"hidden_size": 8}, "malformed"),
        ("config", {"to_dict": 1}, ""),
        ("config", {"to_dict.x": 1}, ""),
    ],
)
def test_folders_with_another_plan(folder, part, value, word):
    edit(folder, lambda plan: plan.update({part: value}))
    assert word in refusal(folder)


@pytest.mark.parametrize("plan", [3, [], {"code": 1}, {"attributes": []}])
def test_malformed_plans_are_refused_by_all_readers(folder, plan):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["hfprune"]["plan"] = plan
    path.write_text(json.dumps(values))
    for action in (read_block, hfprune.verify, hfprune.from_pretrained):
        with pytest.raises(CheckpointError, match="malformed plan") as error:
            action(folder)
        assert str(error.value).startswith(str(path))


def test_a_block_that_is_gone(folder):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    del values["hfprune"]
    path.write_text(json.dumps(values))
    assert "holds no block 'hfprune'" in refusal(folder)


@pytest.mark.parametrize("left", [0, 5, 200, -10])
def test_a_truncated_file(folder, left):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CheckpointError, match="is damaged"):
        hfprune.from_pretrained(folder)


def test_a_tensor_of_another_size(folder):
    retouch(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(20)}))
    assert "'model.norm.weight' has the shape (20,)" in refusal(folder)


def test_a_tensor_that_is_missing(folder):
    retouch(folder, lambda tensors: tensors.pop("model.norm.weight"))
    assert "lacks 'model.norm.weight'" in refusal(folder)


def test_a_tensor_that_nobody_knows(folder):
    retouch(folder, lambda tensors: tensors.update({"model.extra.weight": torch.zeros(2)}))
    assert "unknown 'model.extra.weight'" in refusal(folder)


def test_an_own_module_with_another_plan(tmp_path):
    hfprune.save_pretrained(own(), tmp_path)
    edit(tmp_path, lambda plan: plan["attributes"].update({"head": {"nothing": 1}}))
    with pytest.raises(CheckpointError, match="'head.nothing'"):
        hfprune.from_pretrained(tmp_path, Blocks)


def test_dense_models_are_left_alone(tmp_path):
    for model in (vit(), MLP()):
        hfprune.save_pretrained(model, tmp_path / type(model).__name__)
        assert read_block(tmp_path / type(model).__name__) is None
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "ViTForImageClassification")
    assert again.vit.layers[0].attention.num_attention_heads == 2
