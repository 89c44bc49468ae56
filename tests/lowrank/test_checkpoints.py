"""Factored checkpoints: they load again in every way that is promised, and merge back to stock ones."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

import hfprune
from hfprune import PruningConfig
from hfprune.checkpoint import read_block
from hfprune.checkpoint.metadata import block_of, plan_of
from hfprune.cli import app
from hfprune.errors import CheckpointError
from hfprune.lowrank.factor import factored_layers
from hfprune.structure.plan import Plan
from tests.support.models import TINY, logits

AUTO = {
    **dict.fromkeys(("vit", "timm_vit", "timm_resnet"), "AutoModelForImageClassification"),
    "bert": "AutoModelForSequenceClassification",
    **dict.fromkeys(("llama", "gpt2"), "AutoModelForCausalLM"),
}
EVERY = ("cnn", "vit", "bert", "llama", "gpt2", "timm_vit", "timm_resnet")


@pytest.fixture(autouse=True)
def _modules_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))


def factored(name, granularity="rank", left=0.7):
    torch.manual_seed(0)
    tiny, model = TINY[name], TINY[name].build().eval()
    config = PruningConfig(criterion="l2", granularity=granularity, target={"params": left}, round_to=1)
    hfprune.prune(model, config, tiny.batch())
    return model


def assert_same(loaded, model, name):
    """The same tensors to the bit; answers may round as the tensors lie in memory."""
    values = {key.removeprefix("timm_model."): value for key, value in loaded.state_dict().items()}
    expected = {key.removeprefix("timm_model."): value for key, value in model.state_dict().items()}
    assert values.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in values.items())
    batch = TINY[name].batch()
    assert torch.allclose(logits(loaded.eval(), batch), logits(model, batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_every_kind_comes_back(tmp_path, name):
    model = factored(name)
    hfprune.save_pretrained(model, tmp_path / "one", remote_code=True)
    own = TINY[name].build if TINY[name].kind == "own" else None
    loaded = hfprune.from_pretrained(tmp_path / "one", own)
    assert_same(loaded, model, name)
    block = read_block(tmp_path / "one")
    assert block["format_version"] == 3
    ranks = {path.removeprefix("timm_model."): layer.rank for path, layer in factored_layers(loaded).items()}
    assert block["plan"]["factored"] == ranks == plan_of(model).factored
    names = load_file(tmp_path / "one" / "model.safetensors")
    assert sum(".factor_in.weight" in key for key in names) == len(ranks)
    if own is None:
        hfprune.save_pretrained(loaded, tmp_path / "two")
        kind = getattr(transformers, AUTO[name])
        assert_same(kind.from_pretrained(tmp_path / "two"), model, name)
        by_code = kind.from_pretrained(tmp_path / "one", trust_remote_code=True)
        assert by_code.is_remote_code()
        assert_same(by_code, model, name)
        by_code.save_pretrained(tmp_path / "three")
        assert_same(kind.from_pretrained(tmp_path / "three", trust_remote_code=True), model, name)


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_beside_units_and_without_its_head(tmp_path, name):
    model = factored(name, ["head", "neuron", "rank"], 0.5)
    hfprune.save_pretrained(model, tmp_path, remote_code=True)
    for trust in (False, True):
        kind = getattr(transformers, AUTO[name])
        assert_same(kind.from_pretrained(tmp_path, trust_remote_code=trust), model, name)
        backbone = transformers.AutoModel.from_pretrained(tmp_path, trust_remote_code=trust)
        values = model.base_model.state_dict()
        found = [torch.equal(value, values[key]) for key, value in backbone.state_dict().items() if key in values]
        assert all(found) and len(found) == len(values)


def test_without_hfprune(tmp_path):
    hfprune.save_pretrained(factored("gpt2"), tmp_path / "code", remote_code=True)
    hfprune.save_pretrained(factored("llama"), tmp_path / "plain")
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM as Auto\n"
        "sys.modules['hfprune'] = None\n"
        "model = Auto.from_pretrained('code', trust_remote_code=True)\n"
        "ids = torch.arange(6)[None]\n"
        "model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)\n"
        "model(input_ids=ids, labels=ids).loss.backward()\n"
        "assert all(p.grad is not None for n, p in model.named_parameters() if 'factor' in n)\n"
        "try:\n"
        "    Auto.from_pretrained('plain')\n"
        "except RuntimeError as error:\n"
        "    assert 'mismatch' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('new weights in the place of factors')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", EVERY)
def test_merged_is_a_stock_checkpoint(tmp_path, name):
    model = factored(name)
    expected, layers = logits(model, TINY[name].batch()), factored_layers(model)
    products = {f"{path}.weight": layer.product() for path, layer in layers.items()}
    assert hfprune.merge(model) == len(layers)
    dense = TINY[name].build()
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in dense.state_dict().items()}
    assert all(torch.equal(model.get_parameter(name), value) for name, value in products.items())
    assert plan_of(model) is None and block_of(model)["format_version"] == 1
    hfprune.save_pretrained(model, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = hfprune.from_pretrained(tmp_path, TINY[name].build if TINY[name].kind == "own" else None)
    assert torch.allclose(logits(again, TINY[name].batch()), expected, atol=1e-5)
    assert hfprune.merge(again) == 0


def test_merged_where_more_is_gone(tmp_path):
    model = factored("llama", ["neuron", "rank"], 0.5)
    hfprune.merge(model)
    assert plan_of(model) is not None and not plan_of(model).factored
    hfprune.save_pretrained(model, tmp_path)
    assert_same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), model, "llama")


def test_convert_merges(tmp_path):
    model = factored("llama")
    hfprune.save_pretrained(model, tmp_path / "small")
    (tmp_path / "small" / "tokenizer.json").write_text("{}")
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "small"), str(tmp_path / "dense"), "--to", "dense"])
    assert done.exit_code == 0 and "bytes of tensors" in done.output
    assert (tmp_path / "dense" / "tokenizer.json").read_text() == "{}"
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    batch = TINY["llama"].batch()
    assert not factored_layers(loaded) and torch.allclose(logits(loaded, batch), logits(model, batch), atol=1e-5)


def test_what_can_t_be_converted(tmp_path):
    hfprune.save_pretrained(factored("cnn"), tmp_path / "own")
    for output, words in (("own", "is the folder that is read"), ("new", "give its class or a fresh instance")):
        done = CliRunner().invoke(app, ["convert", str(tmp_path / "own"), str(tmp_path / output), "--to", "dense"])
        assert done.exit_code == 2 and words in done.output.replace("\n", " ")
    assert not (tmp_path / "new").exists()


def test_pruned_again_after_loading(tmp_path):
    model = factored("llama", left=0.8)
    hfprune.save_pretrained(model, tmp_path / "one")
    loaded = hfprune.from_pretrained(tmp_path / "one")
    config = PruningConfig(criterion="l2", granularity=["head", "rank"], target={"params": 0.7}, round_to=1)
    hfprune.prune(loaded, config, TINY["llama"].batch())
    hfprune.save_pretrained(loaded, tmp_path / "two")
    assert_same(hfprune.from_pretrained(tmp_path / "two"), loaded, "llama")


def test_heads_of_a_factored_model(tmp_path):
    model = factored("llama", left=0.8)
    config = PruningConfig(granularity=["head", "neuron"], target={"params": 0.7}, round_to=1)
    hfprune.prune(model, config, TINY["llama"].batch())
    hfprune.save_pretrained(model, tmp_path)
    assert_same(hfprune.from_pretrained(tmp_path), model, "llama")


def test_zeros_inside_factors(tmp_path):
    model = factored("vit")
    hfprune.prune(model, PruningConfig(target=0.5))
    hfprune.save_pretrained(model, tmp_path, sparse="bitmask")
    assert hfprune.verify(tmp_path).tensors
    assert_same(hfprune.from_pretrained(tmp_path), model, "vit")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vit.layers.0.mlp.fc1": 0}, "malformed plan: the rank of 'vit.layers.0.mlp.fc1' is 0"),
        ({"vit.layers.0.mlp.fc1": "2"}, "malformed plan: the rank of"),
        ({"vit.layers.0.mlp.fc1": True}, "malformed plan: the rank of"),
        ({"vit.layers.0.mlp.fc1": 99}, "the plan does not fit 'vit.layers.0.mlp.fc1'"),
        ({"vit.layers.0.layernorm_before": 2}, "and a LayerNorm can't be"),
        ({"vit.nowhere": 2}, "the plan names 'vit.nowhere', which ViTForImageClassification does not have"),
        ({"__class__": 2}, "is no path of a module"),
        ([], "malformed plan: 'factored' is"),
    ],
    ids=str,
)
def test_plans_that_do_not_fit(tmp_path, change, message):
    hfprune.save_pretrained(factored("vit"), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    plan = values["hfprune"]["plan"]
    plan["factored"] = plan["factored"] | change if isinstance(change, dict) else change
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message) as error:
        hfprune.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_a_plan_names_factors_where_there_are_any():
    plan = plan_of(factored("vit")).to_dict()
    assert Plan.from_dict(plan).to_dict() == plan and plan["factored"]
    assert "factored" not in Plan().to_dict()
