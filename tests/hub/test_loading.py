"""The lines by which each kind of checkpoint loads, run as the card says them."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

import hfprune
from hfprune import PruningConfig
from hfprune.errors import CheckpointError
from hfprune.hub.loading import architecture, kind_of, loading_lines
from tests.support import models
from tests.support.cards import load_as_the_card_says, loading_of
from tests.support.models import logits
from tests.support.surgery import SMALL
from tests.training.setup import PlainNet


@pytest.fixture(autouse=True)
def _beside_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))


def masked(model):
    hfprune.prune(model.eval(), PruningConfig(target=0.5))
    return model


KINDS = {  # how it is made and saved; what its lines say; what they do not
    "masked": (lambda: masked(models.vit()), {}, "AutoModelForImageClassification", "hfprune"),
    "uniform": (SMALL["vit_even"].build, {}, "AutoModelForImageClassification", "hfprune"),
    "uneven": (SMALL["llama"].build, {}, "import hfprune\n", "trust_remote_code"),
    "bitmask": (lambda: masked(models.vit()), {"sparse": "bitmask"}, "import hfprune\n", "trust_remote_code"),
    "remote_code": (SMALL["vit"].build, {"remote_code": True}, "trust_remote_code=True", "timm"),
    "timm": (lambda: masked(models.timm_vit()), {}, "timm.create_model", "hfprune"),
    "timm_uneven": (SMALL["timm_vit"].build, {}, "import hfprune\n", "timm.create_model"),
    "module": (lambda: masked(PlainNet()), {}, "from tests.training.setup import PlainNet", "lambda"),
}
TIMM_CLASS = "TimmWrapperForImageClassification"
BATCH = {
    "uneven": "llama",
    "timm": "timm_vit",
    "timm_uneven": "timm_vit",
    **dict.fromkeys(("masked", "uniform", "bitmask", "remote_code"), "vit"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_lines_of_the_card_load_each_kind(tmp_path, kind):
    build, options, said, unsaid = KINDS[kind]
    model = build().eval()
    hfprune.save_pretrained(model, tmp_path / "small", **options)
    card = hfprune.write_card("small")
    lines = loading_of(card)
    assert said in lines and unsaid not in lines
    loaded = load_as_the_card_says(card)["model"].eval()
    if kind == "module":
        pixels = torch.rand(2, 1, 8, 8)
        assert torch.equal(loaded(pixels), model(pixels))
    else:
        batch = SMALL[BATCH[kind]].batch()
        assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_the_tokenizer_is_loaded_where_there_is_one(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    config = BertConfig(vocab_size=6, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    tokenizer = BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt"))
    hfprune.save_pretrained(masked(BertForSequenceClassification(config)), "bert", processing_class=tokenizer)
    names = load_as_the_card_says(hfprune.write_card("bert"))
    assert names["model"](**names["tokenizer"]("a", return_tensors="pt")).logits.shape == (1, 2)


def test_a_class_whose_name_says_nothing_of_its_task():
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    assert 'AutoModelForCausalLM.from_pretrained("gpt2")' in loading_lines(config, "gpt2")
    config = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    assert "AutoModelForMaskedLM" in loading_lines(config, "bert")
    config = {"model_type": "mine", "architectures": ["MyModel"]}
    assert "from transformers import MyModel\n" in loading_lines(config, "mine")


def test_a_module_that_was_made_with_arguments():
    config = {"architectures": ["nets.small:Net"]}
    lines = loading_lines(config, "own", maker={"import": "nets.small:make", "call": "make(width=12)[0]"})
    assert "from nets.small import make\n" in lines and "model=lambda: make(width=12)[0])" in lines


def test_a_class_of_a_script_is_left_to_its_owner():
    lines = loading_lines({"architectures": ["__main__:Net"]}, "own")
    assert "# Net: the model's class, from your own code" in lines and "from __main__" not in lines


def test_a_repository_on_the_hub():
    config = {"model_type": "timm_wrapper", "architecture": "resnet18", "architectures": [TIMM_CLASS]}
    lines = loading_lines(config, "me/small", on_hub=True, revision="v1")
    assert 'AutoModelForImageClassification.from_pretrained("me/small", revision="v1")' in lines
    assert 'timm.create_model("hf-hub:me/small@v1", pretrained=True)' in lines
    assert (kind_of(config), architecture(config)) == ("timm", "resnet18")


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="holds no config.json"):
        hfprune.write_card(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="can't be read"):
            hfprune.write_card(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(CheckpointError, match="says nothing of pruning"):
        hfprune.write_card(tmp_path)
    assert not (tmp_path / "README.md").exists()


ALONE = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hfprune":
            raise ModuleNotFoundError("No module named 'hfprune'", name=name)
sys.meta_path.insert(0, Blocker())
import torch
from safetensors.torch import load_file
for folder in sys.argv[1:]:
    names = {}
    exec(open(folder + ".lines").read(), names)
    tensors = load_file(folder + ".values")
    with torch.no_grad():
        assert torch.equal(names["model"].eval()(tensors["pixels"])[0], tensors["expected"]), folder
assert not [name for name in sys.modules if name.split(".")[0] == "hfprune"]
"""


def test_where_hfprune_is_not_installed(tmp_path):
    """Uniform and masked models, and uneven ones with their file, by the card's own lines and stock libraries."""
    made = {"even": (SMALL["vit_even"].build(), {}), "uneven": (SMALL["vit"].build(), {"remote_code": True})}
    made["zeros"] = (masked(models.vit()), {})
    pixels = SMALL["vit"].batch()["pixel_values"]
    for name, (model, options) in made.items():
        hfprune.save_pretrained(model, name, **options)
        lines = loading_of(hfprune.write_card(name)).partition("# or with hfprune")[0]
        (tmp_path / f"{name}.lines").write_text(lines)
        with torch.no_grad():
            expected = model.eval()(pixels)[0].contiguous()
        save_file({"pixels": pixels.contiguous(), "expected": expected}, f"{name}.values")
    done = subprocess.run([sys.executable, "-c", ALONE, *made], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
