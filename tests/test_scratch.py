"""A small language model from nothing: the embedded text, the tokenizer, and a whole run without a network."""

import json

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfprune import Recipe
from hfprune.data.builtin import python_docs, python_sentences, spoken_sentences
from hfprune.errors import ModelError
from hfprune.models import load_model
from hfprune.pipeline import run
from hfprune.recipe import ModelSection
from hfprune.report.tables import comparison_table, perplexity_conditions
from hfprune.scratch import small_llama

TINY = {"vocabulary": 300, "hidden_size": 16, "intermediate_size": 24, "layers": 2, "heads": 2, "kv_heads": 1}


def test_the_embedded_text_is_large_and_parted():
    parts = python_docs()
    texts = {name: part["text"] for name, part in parts.items()}
    assert sum(len(text) for text in texts["train"]) > 400_000
    assert 0.05 < len(texts["test"]) / len(texts["train"]) < 0.15
    assert python_docs()["train"]["text"][:] == texts["train"][:]


def test_the_embedded_sentences_are_plain_words_each_in_one_part():
    parts = {name: part["text"][:] for name, part in python_sentences().items()}
    every = [text for texts in parts.values() for text in texts]
    assert len(every) == len(set(every)) > 5_000 and set(parts) == {"train", "validation", "test"}
    assert all(4 <= len(text.split()) <= 20 and set(text) <= set("abcdefghijklmnopqrstuvwxyz' ") for text in every)
    assert 0.05 < len(parts["test"]) / len(every) < 0.15
    said = "Note that it's *not* a problem.\n\nSee PEP 8 for more of this.  Too short."
    assert list(spoken_sentences(said)) == ["note that it's not a problem"]


def test_the_tokenizer_writes_down_any_text_and_is_the_same_every_time(tmp_path):
    _, tokenizer = small_llama(**TINY)
    text = "def f(x):\n\treturn x  # größer, 大きい, 🙂"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 300
    assert small_llama(**TINY)[1](text)["input_ids"] == ids
    assert small_llama(**TINY, text="python_sentences")[1](text)["input_ids"] != ids
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == ids


def test_a_function_may_give_a_tokenizer_too():
    loaded = load_model(ModelSection(name="hfprune.scratch:small_llama", args=TINY), "causal-lm", None)
    assert loaded.processing_class.eos_token_id == loaded.model.config.eos_token_id
    assert not loaded.model.training
    with pytest.raises(ModelError, match=r"model\.args\.layer: .* did you mean 'layers'"):
        load_model(ModelSection(name="hfprune.scratch:small_llama", args={"layer": 2}), "causal-lm", None)


@pytest.mark.parametrize("criterion", ["sparsegpt", "wanda"])
def test_a_whole_run_says_how_perplexity_was_measured(tmp_path, criterion):
    recipe = Recipe.parse(
        {
            "model": {"name": "hfprune.scratch:small_llama", "args": TINY},
            "data": {
                "name": "python_docs",
                "task": "causal-lm",
                "block_size": 24,
                "train_samples": 8,
                "eval_samples": 2,
            },
            "pruning": {"criterion": criterion, "target": 0.5, "scope": "layer", "recovery": {"epochs": 0}},
            "training": {"per_device_train_batch_size": 8, "seed": 0, "disable_tqdm": True, "use_cpu": True},
            "output": {"folder": str(tmp_path / "run"), "batch_sizes": [1]},
        }
    )
    with open("/dev/null", "w") as nowhere:
        report = run(recipe, console=Console(file=nowhere))
    assert report["evaluation"] == {"sequence_length": 24, "stride": 24, "dtype": "float32"}
    zeros, total = (sum(entry[key] for entry in report["sparsity"].values()) for key in ("zeros", "numel"))
    assert zeros == total / 2
    sentence = "Perplexity: sequences of 24 tokens, stride 24, the first token of each not counted, in float32."
    assert perplexity_conditions(report) == sentence
    assert sentence in " ".join((comparison_table(report).caption or "").split())
    card = (tmp_path / "run" / "README.md").read_text()
    assert sentence in card
    assert json.loads((tmp_path / "run" / "pruning_report.json").read_text())["evaluation"] == report["evaluation"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert sum(int((value == 0).sum()) for name, value in again.named_parameters() if "proj" in name) == zeros
    ids = AutoTokenizer.from_pretrained(tmp_path / "run")("for x in", return_tensors="pt")["input_ids"]
    assert torch.isfinite(again(ids).logits).all()


def test_what_is_not_known_is_not_said():
    assert perplexity_conditions({"dense": {"metric": {"perplexity": 3.0}}}) is None
    known = {"sequence_length": 8, "stride": 8, "dtype": "float32"}
    assert perplexity_conditions({"dense": {"metric": {"accuracy": 0.5}}, "evaluation": known}) is None
