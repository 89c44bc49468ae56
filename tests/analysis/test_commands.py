"""The commands as a user types them: what they print and leave, and bad input in one line with exit code 2."""

import json

import pytest
import yaml
from matplotlib.image import imread
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import hfprune
from hfprune.cli import app
from tests.support.models import TINY
from tests.test_models import save_tokenizer
from tests.test_pipeline import recipe_values

TINY_VIT = [
    "timm/vit_tiny_patch16_224",
    *("--set", "model.pretrained=false"),
    *("--set", "model.args={img_size: 8, patch_size: 4, in_chans: 1, embed_dim: 16, depth: 1, num_heads: 2}"),
]


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "120"})


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_values(tmp_path / "run")))
    return path


def test_similarity_without_data(tmp_path):
    done = call("similarity", *TINY_VIT, "--criteria", "l1, l2,random", "--ratio", ".3", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "l1 – l2" in done.stdout and "82 units (channel) in 3 layers, of which 0.3 would go" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"similarity.json", "similarity.png"}
    report = json.loads((tmp_path / "out" / "similarity.json").read_text())
    assert report["ratio"] == 0.3 and report["criteria"] == ["l1", "l2", "random"]
    assert report["granularity"] == ["channel"]
    assert imread(tmp_path / "out" / "similarity.png").std() > 0.05


def test_similarity_with_a_recipe_and_data(tmp_path, recipe):
    common = ("--criteria", "l1,taylor", "--granularity", "head", "--granularity", "neuron", "--output", tmp_path / "o")
    done = call("similarity", "--recipe", recipe, *common)
    assert done.exit_code == 0, done.output
    first = json.loads((tmp_path / "o" / "similarity.json").read_text())
    assert first["granularity"] == ["head", "neuron"]
    done = call("similarity", *TINY_VIT, "--data", "digits", "--set", "data.train_samples=64", *common)
    assert done.exit_code == 0, done.output
    done = call("similarity", "--recipe", recipe, *common)  # the same command gives the same figures
    assert json.loads((tmp_path / "o" / "similarity.json").read_text()) == first


def test_sensitivity_and_its_ratios_in_a_recipe(tmp_path, recipe):
    done = call(
        "sensitivity", "--recipe", recipe, "--ratios", ".25,.5", "--tolerance", ".1", "--output", tmp_path / "o"
    )
    assert done.exit_code == 0, done.output
    assert "accuracy with one layer pruned" in done.stdout
    assert {path.name for path in (tmp_path / "o").iterdir()} == {
        "sensitivity.json",
        "per_layer.yaml",
        "sensitivity.png",
    }
    section = yaml.safe_load((tmp_path / "o" / "per_layer.yaml").read_text())["pruning"]
    report = json.loads((tmp_path / "o" / "sensitivity.json").read_text())
    assert report["metric"] == "accuracy" and report["pruning"] == section
    values = recipe_values(tmp_path / "run") | {"pruning": section | {"recovery": {"epochs": 1}}}
    finished = hfprune.run(hfprune.Recipe.parse(values))
    assert finished["steps"][-1]["achieved"] == pytest.approx(section["target"]["ratio"], abs=1e-3)


def test_a_saved_model_is_looked_at_with_its_weights(tmp_path):
    tiny = TINY["gpt2"]
    model = tiny.build()
    hfprune.save_pretrained(model, tmp_path / "saved")
    done = call("similarity", tmp_path / "saved", "--granularity", "weight", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "similarity.json").read_text())
    again = hfprune.similarity(model, ["l1", "l2"], granularity="weight").to_dict()
    assert report["dispersion"]["l1"] == again["dispersion"]["l1"]


def test_a_language_model_by_its_perplexity(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text("good bad film\n" * 200)
    of_text = [tmp_path / "model", "--data", tmp_path / "text.txt", "--set", "data.task=causal-lm"]
    of_text += ["--set", "data.block_size=16", "--output", tmp_path / "out"]
    done = call("sensitivity", *of_text, "--criterion", "taylor", "--ratios", ".5", "--granularity", "neuron")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    assert report["metric"] == "perplexity" and not report["greater_is_better"]
    (entry,) = report["layers"].values()
    assert (entry["units"], entry["pruned"]) == (32, [16])
    assert 0 < abs(entry["values"][0] - report["dense"]) < report["dense"]
    done = call("similarity", *of_text, "--criteria", "l1,movement")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("similarity",), "MODEL: missing"),
        (("similarity", *TINY_VIT, "--criteria", "l1,tailor"), "unknown criterion 'tailor'; did you mean 'taylor'?"),
        (("similarity", *TINY_VIT, "--criteria", ","), "--criteria: none given"),
        (("similarity", *TINY_VIT, "--ratio", "1.5"), "ratio: 1.5 must lie between 0 and 1"),
        (("similarity", *TINY_VIT, "--criteria", "l1,taylor"), "'taylor' scores by gradients and needs data"),
        (("similarity", *TINY_VIT, "--granularity", "chanel"), "unknown granularity 'chanel'"),
        (("similarity", *TINY_VIT, "--set", "pruning.target=.5"), "--set pruning: only `model` and `data` have keys"),
        (("similarity", *TINY_VIT, "--data", "./nowhere"), "data.name: "),
        (("similarity", "timm/vit_tinny_patch16_224"), "did you mean"),
        (("similarity", "torch.nn:ReLU"), "ReLU has no weights"),
        (("similarity", "--recipe", "nowhere.yaml"), "--recipe: no file 'nowhere.yaml'"),
        (("sensitivity", *TINY_VIT), "--data: nothing to measure the metric on"),
        (("sensitivity", *TINY_VIT, "--ratios", ".1,half"), "--ratios: '.1,half' must be numbers"),
        (("sensitivity", *TINY_VIT, "--data", "digits", "--ratios", "0,.5"), "ratios: 0.0 must lie between 0 and 1"),
        (("sensitivity", *TINY_VIT, "--data", "digits", "--set", "data.metrics=[bleu]"), "data.metrics: 'bleu'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, message):
    done = call(*arguments, "--output", tmp_path / "out")
    assert done.exit_code == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "out").exists()
