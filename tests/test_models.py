"""Models by their name in the recipe: they are built, load again in both libraries, and wrong names are answered."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from hfprune.checkpoint.timm import timm_wrapper_config, wrap_timm
from hfprune.errors import ModelError
from hfprune.models import load_model
from hfprune.recipe import ModelSection

DIGITS = [str(i) for i in range(10)]
VIT = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 2}
RESNET = {"in_chans": 1, "layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}
TINY = [("vit_tiny_patch16_224", VIT), ("resnet18", RESNET)]


def load(name, task="image-classification", labels=DIGITS, **section):
    return load_model(ModelSection(name=str(name), **section), task, labels)


def logits(model, x):
    with torch.no_grad():
        out = model.eval()(x)
    return out if isinstance(out, torch.Tensor) else out.logits


def save_tokenizer(folder):
    words = {"[UNK]": 0, "[PAD]": 1, "good": 2, "bad": 3, "film": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)


def tiny_bert(**values):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertConfig(vocab_size=8, max_position_embeddings=16, **sizes, **values)


@pytest.mark.parametrize(("architecture", "args"), TINY)
def test_random_timm_weights_are_timms_own(architecture, args):
    torch.manual_seed(0)
    model = load(f"timm/{architecture}", args=args, pretrained=False).model
    torch.manual_seed(0)
    expected = timm.create_model(architecture, num_classes=10, **args).state_dict()
    found = model.timm_model.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("architecture", "args"), TINY)
def test_a_saved_timm_model_loads_bit_identical_in_both_libraries(architecture, args, tmp_path):
    torch.manual_seed(0)
    loaded = load(f"timm/{architecture}", args=args, pretrained=False)
    x = torch.randn(3, 1, 8, 8)
    expected = logits(loaded.model, x)
    loaded.model.save_pretrained(tmp_path)

    in_transformers = AutoModelForImageClassification.from_pretrained(tmp_path)
    in_timm = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(logits(in_transformers, x), expected)
    assert torch.equal(logits(in_timm, x), expected)
    assert torch.equal(logits(load(tmp_path).model, x), expected)
    assert in_transformers.config.id2label == dict(enumerate(DIGITS))
    assert loaded.base_model is None

    in_transformers.save_pretrained(tmp_path / "again")
    again = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True)
    assert torch.equal(logits(again, x), expected)


def test_a_folder_that_timm_saved_takes_a_new_head_and_nothing_else(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("vit_tiny_patch16_224", num_classes=7, **VIT)
    timm.models.save_for_hf(source, str(tmp_path), safe_serialization=True)
    model = load(tmp_path).model
    assert model.config.num_labels == 10
    found, expected = model.timm_model.state_dict(), source.state_dict()
    assert found["head.weight"].shape == (10, 24)
    assert all(torch.equal(found[key], expected[key]) for key in expected if not key.startswith("head"))


def test_a_timm_folder_with_missing_tensors_is_refused(tmp_path):
    load("timm/vit_tiny_patch16_224", args=VIT, pretrained=False).model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["blocks.0.attn.qkv.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"blocks\.0\.attn\.qkv\.weight"):
        load(tmp_path)
    with pytest.raises(ModelError, match=r"blocks\.0\.attn\.qkv\.weight"):
        load(tmp_path, labels=["a", "b"])


def test_wrap_timm_shares_parameters_and_mode():
    module = timm.create_model("resnet18", num_classes=3, **RESNET)
    wrapper = wrap_timm(module.train())
    assert wrapper.timm_model is module
    assert wrapper.training
    assert {id(p) for p in wrapper.parameters()} == {id(p) for p in module.parameters()}
    assert not any(p.is_meta for p in wrapper.parameters())
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(logits(wrapper, x), logits(module, x))


def test_what_timm_did_not_make_or_cannot_classify_is_refused():
    with pytest.raises(ModelError, match="Linear was not made by timm.create_model"):
        wrap_timm(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="no classifier"):
        wrap_timm(timm.create_model("resnet18", num_classes=0, **RESNET))
    with pytest.raises(ModelError, match="3 classes, but there are 2 labels"):
        wrap_timm(timm.create_model("resnet18", num_classes=3, **RESNET), ["a", "b"])


def test_the_config_of_a_timm_module_says_the_classes_once():
    config = timm_wrapper_config(timm.create_model("vit_tiny_patch16_224", num_classes=3, **VIT), ["x", "y", "z"])
    assert "num_classes" not in config.model_args
    assert config.to_dict()["num_classes"] == 3
    assert config.to_dict()["label_names"] == ["x", "y", "z"]
    assert config.pretrained_cfg["input_size"] == [1, 8, 8]


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ({"name": "timm/vit_tiny_patch16_22"}, r"model\.name: timm has no architecture .*did you mean 'vit_tiny_patch"),
        (
            {"name": "timm/resnet18.a1_in1"},
            r"model\.name: timm's resnet18 has no weights 'a1_in1'; did you mean 'a1_in1k'",
        ),
        ({"name": "timm/resnet18", "args": {"in_chan": 1}}, r"model\.args\.in_chan: .*did you mean 'in_chans'"),
        ({"name": "timm/vit_tiny_patch16_224", "args": {"embed_dim": 25, "num_heads": 2}}, r"can't be built with"),
        ({"name": "timm/resnet18", "args": {"num_classes": 7}}, r"model\.args\.num_classes: 7, .* has 10 classes"),
        (
            {"name": "collections:OrderedDic"},
            r"model\.name: 'collections' has no function .*did you mean 'OrderedDict'",
        ),
        ({"name": "collections:OrderedDict"}, r"returned a OrderedDict, not a torch\.nn\.Module"),
        ({"name": "no_such_module:make"}, r"model\.name: can't import 'no_such_module'"),
        ({"name": "torch.nn:Linear", "args": {"in_feature": 2}}, r"model\.args\.in_feature: .*'in_features'"),
        ({"name": "torch.nn:Linear", "args": {"in_features": 2}}, r"model\.args: torch\.nn:Linear: missing"),
    ],
)
def test_wrong_names_and_arguments_are_answered_in_one_line(section, line):
    with pytest.raises(ModelError, match=line) as caught:
        load_model(ModelSection(pretrained=False, **section), "image-classification", DIGITS)
    assert "\n" not in str(caught.value)


def test_a_missing_path_is_answered_with_the_nearest(tmp_path):
    (tmp_path / "my_model").mkdir()
    with pytest.raises(ModelError, match=rf"no folder '.*my_modle'; did you mean '{tmp_path / 'my_model'}'"):
        load(tmp_path / "my_modle")
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        load(tmp_path / "my_model")


def test_timm_is_for_images():
    with pytest.raises(ModelError, match="image-classification, not causal-lm"):
        load("timm/resnet18", task="causal-lm", labels=None, pretrained=False)


def test_a_function_of_the_users_own_lies_beside_the_run(tmp_path, monkeypatch):
    source = "from torch import nn\ndef make(width, num_labels):\n    return nn.Linear(width, num_labels)\n"
    (tmp_path / "beside_the_run.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    loaded = load("beside_the_run:make", args={"width": 4})
    assert loaded.model.out_features == 10
    assert loaded.processing_class is None
    assert sys.path == before


def test_a_transformers_folder_takes_a_new_head_and_keeps_the_rest(tmp_path):
    torch.manual_seed(0)
    source = BertModel(tiny_bert())
    source.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    loaded = load(tmp_path, task="text-classification", labels=["bad", "good", "so so"])
    assert isinstance(loaded.model, BertForSequenceClassification)
    assert loaded.model.config.id2label == {0: "bad", 1: "good", 2: "so so"}
    assert loaded.processing_class("good film")["input_ids"] == [2, 4]
    assert loaded.model.dtype is torch.float32
    found = loaded.model.bert.state_dict()
    assert all(torch.equal(found[key], value) for key, value in source.state_dict().items())


def test_a_classifier_of_the_same_size_is_kept(tmp_path):
    torch.manual_seed(0)
    source = BertForSequenceClassification(tiny_bert(num_labels=2))
    source.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    model = load(tmp_path, task="text-classification", labels=["bad", "good"]).model
    assert torch.equal(model.classifier.weight, source.classifier.weight)
    resized = load(tmp_path, task="text-classification", labels=["a", "b", "c"]).model
    assert resized.classifier.weight.shape == (3, 16)


@pytest.mark.parametrize("damage", ["missing", "reshaped"])
def test_nothing_but_a_head_is_ever_drawn_anew(tmp_path, damage):
    BertModel(tiny_bert()).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = "encoder.layer.0.intermediate.dense.weight"
    if damage == "missing":
        del tensors[key]
    else:
        tensors[key] = torch.zeros(31, 16)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layer\.0\.intermediate\.dense\.weight") as caught:
        load(tmp_path, task="text-classification", labels=["bad", "good"])
    assert "\n" not in str(caught.value)


def test_a_language_model_has_no_head_to_draw(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    source = LlamaForCausalLM(LlamaConfig(vocab_size=8, tie_word_embeddings=False, **sizes))
    source.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    loaded = load(tmp_path, task="causal-lm", labels=None)
    assert torch.equal(loaded.model.lm_head.weight, source.lm_head.weight)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        load(tmp_path, task="causal-lm", labels=None)


def test_text_needs_a_tokenizer(tmp_path):
    BertModel(tiny_bert()).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no tokenizer"):
        load(tmp_path, task="text-classification", labels=["bad", "good"])


def test_random_weights_from_a_config_with_other_values(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(tmp_path)
    model = load(tmp_path, pretrained=False, args={"num_hidden_layers": 3}).model
    assert (model.config.num_hidden_layers, model.config.num_labels) == (3, 10)
    with pytest.raises(ModelError, match=r"model\.args\.num_hidden_layer: .*did you mean 'num_hidden_layers'"):
        load(tmp_path, pretrained=False, args={"num_hidden_layer": 3})


HUB_SCRIPT = """
    import hashlib, json, sys, time
    from hfprune.errors import NotReachable
    from hfprune.models import load_model
    from hfprune.recipe import ModelSection
    for name in sys.argv[1:]:
        try:
            loaded = load_model(ModelSection(name=name), "image-classification", list("abcdefghij"))
            facts = [loaded.base_model, loaded.model.name_or_path, loaded.model.config.num_labels, loaded.origin]
            print(json.dumps(facts))
        except NotReachable as error:
            print(error)
"""


def run_offline(cache, *names):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    command = [sys.executable, "-c", textwrap.dedent(HUB_SCRIPT), *names]
    result = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert "Traceback" not in result.stderr
    return result.stdout.strip().splitlines()


def test_the_hub_is_read_from_the_cache_or_said_to_be_out_of_reach_in_one_line(tmp_path):
    repository = tmp_path / "models--timm--resnet18.a1_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    source = timm.create_model("resnet18", num_classes=4, **RESNET)
    timm.models.save_for_hf(source, str(snapshot), safe_serialization=True)
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\ndatasets: [imagenet-1k]\n---\n# resnet18\n")

    lines = run_offline(tmp_path, "timm/resnet18.a1_in1k", "timm/resnet34.a1_in1k", "google-bert/bert-base-uncased")
    origin = {"license": "apache-2.0", "datasets": ["imagenet-1k"]}
    assert json.loads(lines[0]) == ["timm/resnet18.a1_in1k", "timm/resnet18.a1_in1k", 10, origin]
    for line, name in zip(lines[1:], ["timm/resnet34.a1_in1k", "google-bert/bert-base-uncased"], strict=True):
        assert line.startswith(f"model.name: '{name}' could not be reached on the Hub (offline mode is on); ")
        assert line.endswith("--set model.name=PATH")
    assert len(lines) == 3


def test_what_a_function_was_called_with_is_remembered(tmp_path, monkeypatch):
    (tmp_path / "nets_to_call.py").write_text(
        "from torch import nn\ndef make(width=2, num_labels=3):\n    return nn.Linear(width, num_labels)\n"
        "def with_words():\n    return nn.Linear(2, 2), 'a tokenizer'\n"
    )
    monkeypatch.chdir(tmp_path)
    made = load("nets_to_call:make", args={"width": 4}).maker
    assert made == {"import": "nets_to_call:make", "call": "make(width=4, num_labels=10)"}
    assert load("nets_to_call:with_words", labels=None).maker["call"] == "with_words()[0]"
    assert load("nets_to_call:make", labels=None).maker["call"] == "make"


def test_what_was_loaded_with_a_new_head_saves_and_loads_plainly(tmp_path):
    BertModel(tiny_bert()).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    loaded = load(tmp_path, task="text-classification", labels=["bad", "good"])
    loaded.model.save_pretrained(tmp_path / "out")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[2, 4]])
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, again.eval()(ids).logits)
