"""The command as a user types it: exit codes, one-line errors, interruption and --resume, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hfprune.recipe import Recipe
from tests.test_pipeline import recipe_values

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "prune.py"), *arguments]


def call(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=300)


def write_recipe(tmp_path: Path, **sections) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_values(tmp_path / "run", **sections)))
    return path


def test_the_command_runs_a_recipe_and_prints_the_table(tmp_path):
    done = call("--recipe", str(write_recipe(tmp_path)), "--set", "pruning.target.ratio=.6")
    assert done.returncode == 0, done.stderr
    for word in ("dense", "pruned", "accuracy", "non-zero parameters", "latency, batch 1"):
        assert word in done.stdout
    assert "phase 2/2: 60.0% pruned" in done.stderr
    assert "\r" not in done.stdout + done.stderr and "\x1b" not in done.stdout + done.stderr


def test_dry_run_changes_nothing(tmp_path):
    done = call("--recipe", str(write_recipe(tmp_path)), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "37.50%" in done.stdout and "50.00%" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "pruning.target.ratoi=.5"), "error: pruning.target.ratoi: unknown key; did you mean 'ratio'?"),
        (("--set", "pruning.target.ratio=1.5"), "error: pruning.target.ratio: input should be less than 1, not 1.5"),
        (("--set", "pruning.schedule.first=.9"), "error: pruning.schedule.first: 0.9 must lie between 0 and the ratio"),
        (("--set", "data.name=./nowhere"), "error: data.name: "),
        (("--set", "model.name=timm/vit_tinny_patch16_224"), "did you mean"),
        (("--set", "training.max_stepz=3"), "error: training.max_stepz: unknown key; did you mean 'max_steps'?"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, message):
    done = call("--recipe", str(write_recipe(tmp_path)), *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_missing_recipe_names_the_nearest(tmp_path):
    write_recipe(tmp_path)
    done = call("--recipe", str(tmp_path / "recpie.yaml"))
    assert done.returncode == 2
    assert "did you mean" in done.stderr and "recipe.yaml" in done.stderr


def test_a_loss_that_is_not_a_number_ends_in_one_line(tmp_path):
    done = call(
        "--recipe", str(write_recipe(tmp_path)), "--set", "training.learning_rate=1e20", "--set", "training.optim=sgd"
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: training.learning_rate: the loss became")


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid(recipe):
    assert Recipe.from_yaml(recipe).output.folder == f"runs/{recipe.stem}"


@pytest.mark.parametrize(
    "name", ["vit_hybrid_cifar10", "resnet_one_shot_cifar10", "bert_iterative_sst2", "tinystories_gradual"]
)
def test_recipes_of_the_hub_end_in_one_line_without_it(name, tmp_path):
    done = call("--recipe", f"recipes/{name}.yaml", "--set", f"output.folder={tmp_path / 'run'}")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "could not be reached on the Hub" in line and "--set data.name=PATH" in line


def interrupt(process: subprocess.Popen, after: str, number: int) -> None:
    """Sends a signal when a line of the process's progress says `after`."""
    for line in process.stderr:
        if after in line:
            process.send_signal(number)
            return


@pytest.mark.parametrize(
    ("after", "number", "code"),
    [
        ("dense training  epoch 1", signal.SIGTERM, 143),
        ("phase 1/2: 37.5% pruned  epoch 1", signal.SIGINT, 130),
        ("phase 2/2: 50.0% pruned", signal.SIGKILL, -9),
    ],
)
def test_an_interrupted_command_resumes_to_the_same_result(tmp_path, after, number, code):
    slower = {"training": {"save_strategy": "epoch"}, "pruning": {"recovery": {"epochs": 3}}, "baseline": {"epochs": 4}}
    recipe = write_recipe(tmp_path, **slower)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert call("--recipe", str(recipe), "--set", f"output.folder={whole}").returncode == 0
    arguments = ("--recipe", str(recipe), "--set", f"output.folder={stopped}")
    process = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT)
    interrupt(process, after, number)
    _, rest = process.communicate(timeout=300)
    assert process.returncode == code, rest
    if code > 0:
        assert "--resume goes on from the last checkpoint" in rest
    done = call(*arguments, "--resume")
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((folder / "pruning_report.json").read_text()) for folder in (whole, stopped))
    assert second["sparsity"] == first["sparsity"]
    assert second["pruned"]["metric"] == first["pruned"]["metric"]
    assert second["dense"]["metric"] == first["dense"]["metric"]


def test_verify_command(tmp_path):
    assert call("--recipe", str(write_recipe(tmp_path))).returncode == 0
    verify = [sys.executable, "-m", "hfprune.cli", "verify"]
    good = subprocess.run([*verify, str(tmp_path / "run")], capture_output=True, text=True, env=ENVIRONMENT)
    assert good.returncode == 0 and "tensors match their records, 50.00% of" in good.stdout
    bad = subprocess.run([*verify, str(tmp_path)], capture_output=True, text=True, env=ENVIRONMENT)
    assert bad.returncode == 2 and "is not a checkpoint" in bad.stderr
