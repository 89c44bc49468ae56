"""A world that is not what was asked for is refused before anything is opened."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hfprune.recipe import Recipe
from tests.support.processes import ROOT
from tests.test_pipeline import recipe_values

ACCELERATE = ["accelerate.commands.accelerate_cli", "launch"]


def launch(launcher: list[str], *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *launcher, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=300,
    )


def prune(tmp_path: Path, launcher: list[str], *more: str) -> str:
    """The error output of a run that must not begin."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(Recipe.parse(recipe_values(tmp_path / "run")).to_yaml())
    done = launch(launcher, "scripts/prune.py", "--recipe", str(recipe), *more)
    assert done.returncode != 0
    assert not (tmp_path / "run").exists()
    return done.stderr


@pytest.mark.parametrize(
    "launcher",
    [
        [*ACCELERATE, "--num_processes", "2"],
        ["accelerate.commands.launch", "--cpu", "--num_processes=2"],
        [*ACCELERATE, "--config_file"],
    ],
    ids=" ".join,
)
def test_a_launcher_is_read(tmp_path, launcher):
    if launcher[-1] == "--config_file":
        launcher = [*launcher, str(tmp_path / "cpus.yaml")]
        (tmp_path / "cpus.yaml").write_text("{distributed_type: MULTI_CPU, num_processes: 2, use_cpu: true}")
    (tmp_path / "ask.py").write_text("from hfprune.training import world\nprint('asked', world.asked_of_launcher())")
    done = launch(launcher, str(tmp_path / "ask.py"))
    assert "asked 2" in done.stdout, done.stderr


def test_one_process_in_place_of_two_is_refused(tmp_path):
    error = prune(tmp_path, [*ACCELERATE, "--cpu", "--num_processes", "2"])
    said = "error: --num_processes: accelerate launch was asked for 2 processes and started 1; use `accelerate launch"
    assert said in error


def test_two_strangers_are_refused(tmp_path):
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    error = prune(tmp_path, torchrun, "--set", "training.use_cpu=false")
    assert "error: training.use_cpu: 2 processes were launched, and each is alone (world size 1)" in error
