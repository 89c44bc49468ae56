"""Checkpoints stored sparse: the same model to the bit, by every way of loading, and back to dense files."""

import json

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import hfprune
from hfprune import PruningConfig
from hfprune.checkpoint.convert import convert
from hfprune.cli import app
from hfprune.errors import CheckpointError, ConfigError
from tests.support.models import TINY, logits, same, snapshot


def pruned(name, granularity="weight", ratio=0.6, **options):
    tiny = TINY[name]
    model = tiny.build().eval()
    target = None if ":" in granularity else ratio
    hfprune.prune(model, PruningConfig(granularity=granularity, target=target, **options), tiny.batch())
    return model


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def size(folder):
    return sum(value.nbytes for path in folder.glob("*.safetensors") for value in load_file(path).values())


@pytest.mark.parametrize("granularity", ["weight", "2:4"])
@pytest.mark.parametrize("name", ["vit", "bert", "llama", "gpt2", "timm_vit", "timm_resnet", "cnn", "tied"])
def test_every_kind_comes_back(tmp_path, name, granularity):
    tiny, model = TINY[name], pruned(name, granularity)
    hfprune.save_pretrained(model, tmp_path / "dense")
    hfprune.save_pretrained(model, tmp_path / "sparse", sparse="bitmask")
    assert size(tmp_path / "sparse") < size(tmp_path / "dense")
    assert hfprune.verify(tmp_path / "sparse").ok
    again = hfprune.from_pretrained(tmp_path / "sparse", tiny.build if tiny.kind == "own" else None)
    assert torch.equal(logits(again, tiny.batch()), logits(model, tiny.batch()))
    # What was loaded is a dense model like any other.
    hfprune.save_pretrained(again, tmp_path / "again")
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("again", "dense"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    one, other = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("again", "dense"))
    assert "quantization_config" not in one
    assert one["hfprune"] == other["hfprune"]


def test_plain_from_pretrained(tmp_path):
    model, batch = pruned("vit"), TINY["vit"].batch()
    hfprune.save_pretrained(model, tmp_path, sparse="bitmask")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert getattr(again.config, "quantization_config", None) is None
    body = transformers.AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        inputs = {"pixel_values": batch["pixel_values"]}
        assert torch.equal(body(**inputs)[0], model.base_model(**inputs)[0])
    again.save_pretrained(tmp_path / "stock")
    assert "quantization_config" not in json.loads((tmp_path / "stock" / "config.json").read_text())
    assert hfprune.verify(tmp_path / "stock").ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_shards(tmp_path, dtype):
    model = pruned("llama").to(dtype)
    hfprune.save_pretrained(model, tmp_path, sparse="bitmask", max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    held = {}
    for path in tmp_path.glob("model-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            held |= dict.fromkeys(file.keys(), path.name)
    assert index == held
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, device_map="cpu")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits(tmp_path, dtype):
    """transformers builds no model of this dtype on a CPU; it casts such files, dense or sparse, to that asked for."""
    model = pruned("mlp").to(dtype)
    hfprune.save_pretrained(model, tmp_path / "own", sparse="bitmask")
    again = hfprune.from_pretrained(tmp_path / "own", lambda: TINY["mlp"].build().to(dtype))
    assert same(again.state_dict(), model.state_dict())
    model = pruned("llama").to(dtype)
    hfprune.save_pretrained(model, tmp_path / "sparse", sparse="bitmask")
    assert any(name.endswith(":values") for name in load_file(tmp_path / "sparse" / "model.safetensors"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.bfloat16)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.to(torch.bfloat16)), name
    convert(tmp_path / "sparse", tmp_path / "dense", sparse=False)
    assert same(load_file(tmp_path / "dense" / "model.safetensors"), model.state_dict())


@pytest.mark.parametrize("granularity", ["weight", "2:4"])
def test_devices(tmp_path, granularity):
    model = pruned("llama", granularity)
    hfprune.save_pretrained(model, tmp_path, sparse="bitmask", max_shard_size="8KB")
    kind, state = transformers.AutoModelForCausalLM, model.state_dict()
    for devices in ("cpu", "auto"):
        again = kind.from_pretrained(tmp_path, device_map=devices)
        assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    shapes = kind.from_pretrained(tmp_path, device_map={"": "meta"})
    assert {name: value.shape for name, value in shapes.state_dict().items()} == {n: v.shape for n, v in state.items()}
    assert all(parameter.is_meta for parameter in shapes.parameters())
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places["model.layers.1"] = "disk"
    again = kind.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(again, TINY["llama"].batch()), logits(model, TINY["llama"].batch()))


def test_smaller_and_sparse_at_once(tmp_path):
    tiny = TINY["llama"]
    model = pruned("llama", ["head", "neuron"], 0.4, round_to=1)
    hfprune.prune(model, PruningConfig(target=0.5), tiny.batch())
    hfprune.save_pretrained(model, tmp_path, sparse="bitmask")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, tiny.batch()), logits(model, tiny.batch()))
    assert hfprune.verify(tmp_path).ok


def test_converted_both_ways_by_the_command(tmp_path):
    model = pruned("bert")
    hfprune.save_pretrained(model, tmp_path / "dense")
    before = contents(tmp_path / "dense")
    for source, target, kind in (("dense", "sparse", "bitmask"), ("sparse", "back", "dense")):
        done = CliRunner().invoke(app, ["convert", str(tmp_path / source), str(tmp_path / target), "--to", kind])
        assert done.exit_code == 0, done.output
    assert contents(tmp_path / "dense") == before
    assert (
        load_file(tmp_path / "back" / "model.safetensors").keys()
        == load_file(tmp_path / "dense" / "model.safetensors").keys()
    )
    assert json.loads(contents(tmp_path / "back")["config.json"]) == json.loads(before["config.json"])
    for path, kind, message in (("dense", "zip", "no way of storing"), ("none", "dense", "error: ")):
        done = CliRunner().invoke(app, ["convert", str(tmp_path / path), str(tmp_path / "new"), "--to", kind])
        assert done.exit_code == 2
        assert message in done.output
        assert not (tmp_path / "new").exists()


def test_what_can_not_be_stored_sparse(tmp_path):
    model = TINY["vit"].build()
    with pytest.raises(ConfigError, match="nothing of the model is held at zero"):
        hfprune.save_pretrained(model, tmp_path / "new", sparse="bitmask")
    with pytest.raises(ConfigError, match="'zip' is no way of storing; known: bitmask"):
        hfprune.save_pretrained(model, tmp_path / "new", sparse="zip")
    assert not (tmp_path / "new").exists()
    hfprune.save_pretrained(model, tmp_path / "plain")
    with pytest.raises(CheckpointError, match="no recorded sparsity"):
        convert(tmp_path / "plain", tmp_path / "new", sparse=True)
    assert not (tmp_path / "new").exists()


def tampered(path, change):
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def first(tensors, end):
    return next(name for name in tensors if name.endswith(end))


def shorter(tensors, metadata):
    name = first(tensors, ":values")
    tensors[name] = tensors[name][:-1].clone()


def without_mask(tensors, metadata):
    del tensors[first(tensors, ":mask")]


def other_places(tensors, metadata):
    name = first(tensors, ":mask")
    tensors[name] = tensors[name].flip(0).contiguous()


def no_shapes(tensors, metadata):
    metadata["hfprune_shapes"] = "{"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shorter, "can't be expanded: the mask has .* places, but there are"),
        (without_mask, "does not hold both parts of the sparse tensor"),
        (other_places, "as many zeros as recorded, but in other places"),
        (no_shapes, "'hfprune_shapes' is no map of shapes"),
    ],
)
@pytest.mark.parametrize("name", ["vit", "cnn"])
def test_damage_is_named_and_nothing_is_loaded(tmp_path, name, change, message):
    hfprune.save_pretrained(pruned(name), tmp_path, sparse="bitmask")
    tampered(tmp_path / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=message):
        hfprune.from_pretrained(tmp_path, TINY[name].build if TINY[name].kind == "own" else None)


LOADERS = [hfprune.from_pretrained, transformers.AutoModelForImageClassification.from_pretrained]


@pytest.mark.parametrize("load", LOADERS, ids=["checked", "plain"])
@pytest.mark.parametrize(("change", "message"), [
    (shorter, "can't be expanded: the mask has .* places, but there are"),
    (without_mask, "does not hold both parts of the sparse tensor"),
    (no_shapes, "'hfprune_shapes' is no map of shapes"),
])  # fmt: skip
def test_damage_is_named_by_plain_loading_too(tmp_path, load, change, message):
    hfprune.save_pretrained(pruned("vit"), tmp_path, sparse="bitmask")
    tampered(tmp_path / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("load", LOADERS, ids=["checked", "plain"])
def test_a_newer_format_is_not_guessed_at(tmp_path, load):
    hfprune.save_pretrained(pruned("vit"), tmp_path, sparse="bitmask")
    config = json.loads((tmp_path / "config.json").read_text())
    config["hfprune"]["format_version"] = 9
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="written in format 9, and this version reads up to 3; upgrade hfprune"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="written in format 9"):
        convert(tmp_path, tmp_path / "new", sparse=False)
    assert not (tmp_path / "new").exists()


def test_truncated_shards(tmp_path):
    hfprune.save_pretrained(pruned("llama"), tmp_path, sparse="bitmask", max_shard_size="8KB")
    shard = max(tmp_path.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    for load in (
        hfprune.from_pretrained,
        transformers.AutoModelForCausalLM.from_pretrained,
        lambda folder: convert(folder, folder / "new", sparse=False),
        hfprune.verify,
    ):
        with pytest.raises(CheckpointError, match="is damaged") as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_an_instance_that_does_not_fit_is_left_alone(tmp_path):
    """A module of other sizes, and a plan whose layers the model does not have."""
    hfprune.save_pretrained(pruned("mlp"), tmp_path / "own", sparse="bitmask")
    wider = type(TINY["mlp"].build())(width=16)
    before = snapshot(wider)
    with pytest.raises(CheckpointError, match="does not fit MLP: 'first.bias' has the shape"):
        hfprune.from_pretrained(tmp_path / "own", wider)
    assert same(snapshot(wider), before)
    model = pruned("llama", ["head", "neuron"], 0.4, round_to=1)
    hfprune.prune(model, PruningConfig(target=0.5), TINY["llama"].batch())
    hfprune.save_pretrained(model, tmp_path / "cut", sparse="bitmask")
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    config["hfprune"]["plan"]["dense_config"] = {"num_hidden_layers": 5}
    config["hfprune"]["plan"]["config"] = {"num_hidden_layers": 5}
    (tmp_path / "cut" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(CheckpointError, match="does not fit LlamaForCausalLM") as caught:
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert "\n" not in str(caught.value)


def mixtral():
    """Its experts are single tensors on disk, and are joined while they are loaded."""
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    masks = hfprune.prune(model, PruningConfig(target=0.6)).masks
    name = "model.layers.0.mlp.experts.down_proj"
    masks.kept[name] = torch.rand(model.get_parameter(name).shape) > 0.6
    return model, masks.apply(model)


def test_what_loading_joins_stays_dense(tmp_path):
    model, masks = mixtral()
    hfprune.save_pretrained(model, tmp_path / "sparse", masks, sparse="bitmask")
    block = json.loads((tmp_path / "sparse" / "config.json").read_text())["hfprune"]
    assert any(".experts." in name for name in block["sparsity"])
    assert block["encodings"]
    assert not any(".experts." in name for name in block["encodings"])
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    # Converted, without a model that says what it joins: refused before anything is loaded, and it goes back.
    convert(tmp_path / "sparse", tmp_path / "all", sparse=True)
    with pytest.raises(
        CheckpointError, match="is stored sparse, and MixtralForCausalLM joins it with others: `hfprune"
    ):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "all")
    convert(tmp_path / "all", tmp_path / "back", sparse=False)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
