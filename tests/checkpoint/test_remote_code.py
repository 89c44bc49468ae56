"""remote_code: uneven models load where hfprune is not installed, from a small readable file."""

import ast
import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import save_file

import hfprune
from hfprune.errors import CheckpointError
from tests.support.models import logits
from tests.support.surgery import SMALL, Surgery

UNEVEN = [name for name, small in SMALL.items() if small.kind in ("uneven", "timm")]
AUTO = {
    "bert": "AutoModelForSequenceClassification",
    "t5": "AutoModelForSeq2SeqLM",
    **dict.fromkeys(("vit", "resnet", "timm_vit", "timm_resnet"), "AutoModelForImageClassification"),
    **dict.fromkeys(("llama", "llama_tied", "llama_rotary", "llama_shallow_uneven", "gpt2"), "AutoModelForCausalLM"),
}
BLOCKED = """
import json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hfprune":
            raise ModuleNotFoundError("No module named 'hfprune'", name=name)
sys.meta_path.insert(0, Blocker())
import torch, transformers
from safetensors.torch import load_file
for folder, auto, again in json.load(open(sys.argv[1])):
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
    tensors = load_file(folder + ".safetensors")
    expected = tensors.pop("expected")
    with torch.no_grad():
        assert torch.equal(model(**tensors)[0], expected), folder
        model.save_pretrained(again)
        model = getattr(transformers, auto).from_pretrained(again, trust_remote_code=True)
        assert torch.equal(model(**tensors)[0], expected), again
        if auto == "AutoModelForCausalLM":
            model.generate(tensors["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0)
    model.float()
assert not [name for name in sys.modules if name.split(".")[0] == "hfprune"]
"""


@pytest.fixture(autouse=True)
def _modules_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))


def inputs_of(name):
    batch = SMALL[name].batch()
    return {k: v for k, v in batch.items() if k != "labels"} if isinstance(batch, dict) else {"pixel_values": batch[0]}


def test_without_hfprune(tmp_path):
    jobs = []
    for name in UNEVEN:
        model = SMALL[name].build()
        hfprune.save_pretrained(model, tmp_path / name, remote_code=True)
        tensors = {k: v.contiguous() for k, v in inputs_of(name).items()}
        expected = logits(model, SMALL[name].batch()).contiguous()
        save_file(tensors | {"expected": expected}, tmp_path / f"{name}.safetensors")
        jobs.append([str(tmp_path / name), AUTO[name], str(tmp_path / f"{name}-again")])
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    (tmp_path / "blocked.py").write_text(BLOCKED)
    command = [sys.executable, tmp_path / "blocked.py", tmp_path / "jobs.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", ["vit", "llama_rotary", "llama_shallow_uneven", "timm_vit"])
def test_with_hfprune_both_ways(tmp_path, name):
    model, batch = SMALL[name].build(), SMALL[name].batch()
    hfprune.save_pretrained(model, tmp_path, remote_code=True)
    auto = getattr(transformers, AUTO[name])
    for trust in (True, False):
        again = auto.from_pretrained(tmp_path, trust_remote_code=trust)
        assert again.is_remote_code() is trust
        assert torch.equal(logits(again, batch), logits(model, batch))
    assert torch.equal(logits(hfprune.from_pretrained(tmp_path), batch), logits(model, batch))


@pytest.mark.parametrize("name", ["vit", "llama", "llama_rotary", "llama_shallow_uneven", "resnet"])
def test_without_its_head(tmp_path, name):
    model = SMALL[name].build()
    hfprune.save_pretrained(model, tmp_path, remote_code=True)
    again = transformers.AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(**inputs_of(name))[0], model.base_model(**inputs_of(name))[0])


def test_the_file_is_small_readable_and_the_same_each_time(tmp_path):
    texts = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        hfprune.save_pretrained(SMALL["llama_rotary"].build(), folder, remote_code=True)
        texts.append((folder / "modeling_hfprune.py").read_text())
    assert texts[0] == texts[1]
    tree = ast.parse(texts[0])
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported - sys.stdlib_module_names == {"torch", "transformers"}
    assert len(texts[0]) < 8000


def test_what_needs_no_file_gets_none(tmp_path):
    for name in ("vit_even", "own"):
        hfprune.save_pretrained(SMALL[name].build(), tmp_path / name, remote_code=True)
        assert not list((tmp_path / name).glob("*.py"))
        assert "auto_map" not in json.loads((tmp_path / name / "config.json").read_text())


class Mine(transformers.ViTForImageClassification):
    """A class that transformers does not have."""


def test_a_class_that_is_not_transformers_own(tmp_path):
    model = Surgery(Mine(SMALL["vit"].build().config.__class__(hidden_size=16, num_hidden_layers=2,
                         num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4)))  # fmt: skip
    model = model.linear([0, 1], ["vit.layers.0.mlp.fc1"], ["vit.layers.0.mlp.fc2"]).done()
    with pytest.raises(CheckpointError, match="remote_code: Mine is no class of transformers"):
        hfprune.save_pretrained(model, tmp_path / "new", remote_code=True)
    assert not (tmp_path / "new").exists()
