"""Language models in a comparison and from the command line, tried on n-best lists."""

import csv
import json

import pytest
import torch
import yaml
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import hfprune
from hfprune.analysis.axes import AxesComparison
from hfprune.analysis.rescored import simulated_lists
from hfprune.cli import app
from hfprune.errors import ConfigError
from hfprune.grid import Rescore
from hfprune.recipe import DataSection
from hfprune.scratch import byte_tokenizer
from hfprune.speech.nbest import Hypothesis, NBest, nbest_lines

TEXTS = ["the cat sat on the mat", "a dog ran to the cat", "the dog sat on a mat", "a bat ran to the dog"]
LISTS = [
    NBest(text, (Hypothesis(" ".join(text.split()[::-1]), 0.1), Hypothesis(text, 0.0), Hypothesis("the " + text, -0.1)))
    for text in TEXTS
]


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "180"})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with texts in three splits, a tiny Llama that knows nothing, a pruned one, and n-best lists."""
    folder = tmp_path_factory.mktemp("rescored")
    (folder / "texts").mkdir()
    for split, times in (("train", 24), ("validation", 4), ("test", 3)):
        lines = [json.dumps({"text": text}) for text in TEXTS * times]
        (folder / "texts" / f"{split}.jsonl").write_text("\n".join(lines))
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(TEXTS, 270)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
                         bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    pruned = {"granularity": ["neuron"], "target": 0.5, "round_to": 1}
    hfprune.prune(model, hfprune.PruningConfig(**pruned), data={"input_ids": torch.ones(1, 8, dtype=torch.long)})
    hfprune.save_pretrained(model, folder / "pruned", processing_class=tokenizer)
    (folder / "nbest.jsonl").write_text(nbest_lines(LISTS))
    return folder


def recipe_of(place, folder, rescore, **compare):
    grid = {"methods": [{"name": "unstructured", "criteria": ["l1", "taylor"]}], "schedules": ["one_shot"],
            "sizes": [0.8], "seeds": 1, "budget": 1, "rescore": rescore}  # fmt: skip
    values = {
        "model": {"name": str(place / "dense")},
        "data": {"name": str(place / "texts"), "task": "causal-lm", "eval_split": "validation", "block_size": 16},
        "baseline": {"epochs": 1},
        "pruning": {"target": 0.5, "scope": "global"},
        "compare": grid | compare,
        "training": {"per_device_train_batch_size": 8, "learning_rate": 1e-2, "save_strategy": "no", "seed": 0},
        "output": {"folder": str(folder / "out"), "batch_sizes": [1]},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    done = call("compare", recipe_of(place, folder, {"lists": "simulated", "hypotheses": 4}))
    assert done.exit_code == 0, done.output
    return folder / "out", done.stdout


# ---- in a comparison --------------------------------------------------------------------------------------------


def test_a_comparison_tries_every_model_on_the_lists(finished):
    folder, printed = finished
    report = json.loads((folder / "compare.json").read_text())
    for run in report["runs"]:
        found = run["rescoring"]
        assert found["oracle_wer"] <= found["wer"] <= 1 and found["utterances"] == 12 and found["hypotheses"] == 48
        assert found["milliseconds"] > 0 and found["dense_milliseconds"] > 0 and found["speedup"] > 0
        assert run["dense_rescoring"]["first_best_wer"] == found["first_best_wer"]
        assert run["main_metric"] == "perplexity" and run["value"] == run["metric"]["perplexity"]
    words = report["rescored"]
    assert words["metric"] == "wer" and len(words["claims"]) == len(report["claims"]) == 3
    assert {g["mean"] for g in words["groups"]} == {run["rescoring"]["wer"] for run in report["runs"]}
    assert {tuple(g["speedup"]) for g in words["groups"]} == {("4",)}
    rows = list(csv.DictReader((folder / "compare.csv").open()))
    assert {float(row["wer"]) for row in rows} == {g["mean"] for g in words["groups"]}
    assert (folder / "wer.png").read_bytes().startswith(b"\x89PNG")
    assert "scored" not in printed  # no such column beside WER
    assert "the claims by the word error rate" in printed and "the best that the lists allow" in printed


def test_claims_are_judged_by_words_too(finished):
    runs = json.loads((finished[0] / "compare.json").read_text())["runs"]
    made = []
    for seed, noise in ((0, 0.001), (1, -0.001)):
        for size in (0.8, 0.6, 0.4):
            for run in runs:
                better = run["looks_at_data"]
                rescoring = run["rescoring"] | {"wer": (0.2 if better else 0.3) + noise}
                value = (30.0 if better else 20.0) + noise
                made.append(run | {"seed": seed, "size": size, "value": value, "rescoring": rescoring})
    found = AxesComparison(made, len(made))
    assert found.claims[0].verdict == "not confirmed" and found.rescored.claims[0].verdict == "confirmed"
    lost = {key: value for key, value in made[0].items() if key not in ("model", "rescoring")}
    mixed = AxesComparison([lost | {"value": None, "failed": "nan"}, *made[2:]], len(made))
    assert mixed.table() is not None and mixed.to_dict()["rescored"]["groups"] and mixed.to_csv()


def test_other_lists_in_the_same_folder_are_refused(place, finished, tmp_path):
    path = recipe_of(place, tmp_path, {"lists": "simulated", "hypotheses": 4})
    done = call("compare", path, "--set", f"output.folder={finished[0]}", "--set", "compare.rescore.noise=.5")
    assert done.exit_code == 2 and "compare.rescore.noise: 0.5 now" in done.stderr


def test_lists_that_are_too_long_for_the_model_are_refused_before_it_is_trained(place, tmp_path):
    (tmp_path / "long.jsonl").write_text(nbest_lines([*LISTS, NBest("cat", (Hypothesis("the cat " * 40, 0.0),))]))
    done = call("compare", recipe_of(place, tmp_path, str(tmp_path / "long.jsonl")))
    assert done.exit_code == 2 and "tokens, and the language model takes 64" in done.stderr
    assert not (tmp_path / "out" / "dense").exists()


def test_simulated_lists_never_show_what_models_were_trained_on(place):
    section = DataSection(name=str(place / "texts"), task="causal-lm", eval_split="validation")
    test, development = simulated_lists(section, Rescore(lists="simulated", utterances=3))
    assert [one.reference for one in test] == TEXTS[:3] and len(development) == 3 and test != development
    assert test == simulated_lists(section, Rescore(lists="simulated", utterances=3))[0]
    with pytest.raises(ConfigError, match="data.eval_split: say `validation`"):
        simulated_lists(section.model_copy(update={"eval_split": "test"}), Rescore(lists="simulated"))
    with pytest.raises(ConfigError, match=r"compare.rescore.words: no text of .* is as short as 2 words"):
        simulated_lists(section, Rescore(lists="simulated", words=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "compare.rescore.lists=none.jsonl"), "'none.jsonl' can't be read"),
        (("--set", "compare.rescore=none.jsonl"), "'none.jsonl' can't be read"),
        (("--set", "compare.rescore.development=a.jsonl"), "simulated lists have their own, from the split validation"),
        (("--set", "compare.rescore={lists: a.jsonl, noise: 1.0}"), "compare.rescore.noise: says how lists are simul"),
        (("--set", "compare.rescore.nois=1"), "compare.rescore.nois: unknown key; did you mean 'noise'?"),
        (("--set", "compare.methods=null", "--set", "compare.sizes=null"), "compare.rescore: needs methods"),
    ],
)
def test_bad_input_is_one_line(place, tmp_path, arguments, message):
    done = call("compare", recipe_of(place, tmp_path, {"lists": "simulated"}), *arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr and "Traceback" not in done.stderr and not (tmp_path / "out").exists()


# ---- from the command line --------------------------------------------------------------------------------------


def test_rescore_prints_and_writes_what_each_model_makes_of_the_lists(place, tmp_path):
    out = tmp_path / "found.json"
    done = call("rescore", place / "nbest.jsonl", "--models", place / "dense", place / "pruned",
                "--development", place / "nbest.jsonl", "--json", out)  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    dense, pruned = report["models"]
    assert report["utterances"] == 4 and report["oracle_wer"] == 0.0 < report["first_best_wer"]
    assert pruned["bytes"] < dense["bytes"] and pruned["perplexity"] != dense["perplexity"]
    assert all(0 <= row["wer"] <= report["first_best_wer"] and len(row["choices"]) == 1 for row in (dense, pruned))
    assert "WER" in done.stdout and "ms, utterance" in done.stdout


def test_a_model_that_can_not_rescore_is_a_row_and_the_others_go_on(place, tmp_path):
    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path / "bert")
    done = call("rescore", place / "nbest.jsonl", "--models", place / "dense", tmp_path / "bert", tmp_path / "none")
    assert done.exit_code == 2 and "Traceback" not in done.output
    said = " ".join(done.stdout.split())  # long paths break its lines
    assert "BertModel, which is no causal language model" in said and "none" in said
    assert "each half's on the other half" in said


def test_utterances_without_a_word_are_counted(place, tmp_path):
    path = tmp_path / "nbest.jsonl"
    path.write_text(nbest_lines([*LISTS, NBest("…", (Hypothesis("a", 0.0),))]))
    done = call("rescore", path, "--models", place / "dense")
    assert done.exit_code == 0 and "1 of 5 utterances are left out" in done.stderr
    path.write_text('{"reference": 1}\n')
    done = call("rescore", path, "--models", place / "dense")
    assert done.exit_code == 2 and "line 1: not of the form" in done.stderr
