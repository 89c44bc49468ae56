"""run_streamed(): the recipe of a run in memory, block by block; and what --stream refuses in one line."""

from __future__ import annotations

import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

import hfprune
from hfprune import Recipe
from hfprune.cli import app
from hfprune.errors import ConfigError
from hfprune.pipeline import run
from hfprune.scratch import small_llama
from hfprune.streamed import run_streamed
from tests.test_pipeline import quiet


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A small language model with its tokenizer, in shards."""
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "layers": 2, "heads": 4, "kv_heads": 2, "positions": 32}
    model, tokens = small_llama(vocabulary=300, **sizes)
    model.save_pretrained(folder, max_shard_size="20KB")
    tokens.save_pretrained(folder)
    return folder


def values(dense, output, **sections):
    given = {
        "model": {"name": str(dense)},
        "data": {
            "name": "python_docs",
            "task": "causal-lm",
            "block_size": 16,
            "train_samples": 200,
            "eval_samples": 20,
        },
        "pruning": {"criterion": {"name": "wanda", "batches": 3}, "target": 0.5, "recovery": {"epochs": 0}},
        "training": {"per_device_train_batch_size": 2, "seed": 3, "disable_tqdm": True},
        "output": {"folder": str(output), "batch_sizes": [1]},
    }
    return given | {name: given.get(name, {}) | section for name, section in sections.items()}


@pytest.mark.parametrize("criterion", [{"name": "sparsegpt", "batches": 3}, "l1"])
def test_the_same_weights_as_a_run_in_memory(criterion, dense, tmp_path):
    pruning = {"criterion": criterion}
    run(Recipe.parse(values(dense, tmp_path / "memory", pruning=pruning)), console=quiet())
    recipe = Recipe.parse(values(dense, tmp_path / "stream", pruning=pruning))
    run_streamed(recipe, quiet())
    memory = hfprune.from_pretrained(tmp_path / "memory").state_dict()
    stream = hfprune.from_pretrained(tmp_path / "stream").state_dict()
    assert all(torch.equal(memory[name], stream[name]) for name in memory)
    assert Recipe.from_yaml(tmp_path / "stream" / "recipe.yaml") == recipe
    assert (tmp_path / "stream" / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()


def call(tmp_path, recipe, *arguments):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return CliRunner().invoke(app, ["prune", "--recipe", str(path), "--stream", *arguments])


def test_the_command_says_the_bound_first(dense, tmp_path):
    done = call(tmp_path, values(dense, tmp_path / "out"))
    assert done.exit_code == 0, done.output
    bound, end = done.stdout.splitlines()
    assert bound.startswith("peak memory at most") and "block 'model.layers.0' while it is pruned" in bound
    assert end.startswith("pruned 1,920 of 3,840 units (50.00%)") and str(tmp_path / "out") in end
    assert hfprune.verify(tmp_path / "out").ok


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("model.name=some/model", "model.name: 'some/model' is no folder"),
        ("model.pretrained=false", "model.pretrained: false"),
        ("model.args.hidden_size=8", "model.args.hidden_size: --stream prunes a checkpoint"),
        ("model.args.dtype=bfloat16", "model.args.dtype: bfloat16, but the checkpoint holds float32"),
        ("baseline.epochs=1", "baseline: --stream prunes"),
        ("pruning.recovery.epochs=2", "pruning.recovery.epochs: --stream prunes"),
        ("output.push_to_hub=me/mine", "output.push_to_hub: --stream pushes nothing"),
        ("pruning.criterion=taylor", "pruning.criterion: 'taylor' needs the whole model"),
        ("data.name=nothing_here/x.txt", "data.name"),
    ],
)
def test_what_a_recipe_may_not_say(key, problem, dense, tmp_path):
    done = call(tmp_path, values(dense, tmp_path / "out"), "--set", key)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ") and problem in done.stderr and done.stderr.count("\n") == 1
    assert not list((tmp_path / "out").glob("*"))


def test_a_dry_run_or_going_on_has_no_meaning(dense, tmp_path):
    for option in ("--dry-run", "--resume"):
        done = call(tmp_path, values(dense, tmp_path / "out"), option)
        assert done.exit_code == 2 and "--stream: goes with neither" in done.stderr


def test_the_dense_folder_is_not_written_to(dense):
    with pytest.raises(ConfigError, match="pruning.recovery"):
        run_streamed(Recipe.parse(values(dense, dense, pruning={"recovery": {}})), Console(quiet=True))
    before = {path.name: path.read_bytes() for path in dense.iterdir()}
    with pytest.raises(hfprune.HfpruneError, match="is the folder that is read"):
        run_streamed(Recipe.parse(values(dense, dense)), Console(quiet=True))
    assert {path.name: path.read_bytes() for path in dense.iterdir()} == before
