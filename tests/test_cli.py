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
from safetensors.torch import load_file, save_file

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


def test_two_processes_run_a_recipe_and_end_in_order(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    recipe = write_recipe(tmp_path, training={"use_cpu": True})
    for more in ((), ("--resume",)):  # the second only shows what the first made
        done = subprocess.run(
            [*launcher, *command("--recipe", str(recipe), *more)[1:]],
            capture_output=True,
            text=True,
            env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "terminate called" not in done.stderr
        assert done.stdout.count("saved to") == 1
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_dry_run_changes_nothing(tmp_path):
    done = call("--recipe", str(write_recipe(tmp_path)), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "37.50%" in done.stdout and "50.00%" in done.stdout
    assert not (tmp_path / "run").exists()


STRUCTURED = {
    "target": {"macs": 0.5},
    "granularity": ["head", "neuron"],
    "round_to": 1,
    "schedule": {"kind": "constant", "steps": 2},
}


def test_dry_run_of_a_removal_says_what_would_go(tmp_path):
    done = call("--recipe", str(write_recipe(tmp_path, pruning=STRUCTURED)), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "25.00% MACs removed" in done.stdout and "50.00% MACs removed" in done.stdout
    assert "timm_model.blocks.0.mlp.fc1" in done.stdout and "neuron" in done.stdout
    assert "left: parameters" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pruning.target.macs=.01", "error: pruning.target.macs: 1.00% of the dense model can't be reached"),
        ("pruning.granularity=channels", "error: pruning.granularity: unknown granularity 'channels'"),
        ("pruning.ignore=[nothing]", "error: pruning.ignore: 'nothing'"),
    ],
)
def test_a_removal_that_can_not_be_is_one_line(tmp_path, override, message):
    done = call("--recipe", str(write_recipe(tmp_path, pruning=STRUCTURED)), "--set", override)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(message)
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
    "name",
    [
        "vit_hybrid_cifar10",
        "resnet_one_shot_cifar10",
        "bert_iterative_sst2",
        "tinystories_gradual",
        "resnet_structured_cifar10",
        "bert_heads_neurons_sst2",
        "opt_sparsegpt_2of4",
        "llama_wanda",
    ],
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
    # Long enough for a signal to arrive before the run has ended.
    slower = {
        "training": {"save_strategy": "epoch"},
        "pruning": {"recovery": {"epochs": 15}},
        "baseline": {"epochs": 8},
    }
    recipe = write_recipe(tmp_path, **slower)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert call("--recipe", str(recipe), "--set", f"output.folder={whole}").returncode == 0
    arguments = ("--recipe", str(recipe), "--set", f"output.folder={stopped}")
    process = subprocess.Popen(
        command(*arguments),
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
    )
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


def inspect(*arguments: str) -> subprocess.CompletedProcess:
    """`hfprune inspect`, whose module is run as the console script runs it."""
    command = [sys.executable, "-m", "hfprune.cli", "inspect", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=300)


def test_inspect_prints_the_groups_and_what_is_protected(tmp_path):
    args = "model.args={img_size: 8, patch_size: 4, in_chans: 1, embed_dim: 16, depth: 1, num_heads: 2, num_classes: 3}"
    done = inspect("timm/vit_tiny_patch16_224", "--set", args, "--json", str(tmp_path / "groups.json"))
    assert done.returncode == 0, done.stderr
    for word in ("timm_model.blocks.0.attn.qkv", "head", "neuron", "protected", "reaches the model's output"):
        assert word in done.stdout
    found = json.loads((tmp_path / "groups.json").read_text())
    neurons = next(group for group in found["groups"] if group["kind"] == "neuron")
    assert (neurons["units"], neurons["params"]) == (64, 64 * (16 + 1 + 16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("timm/vit_tinny_patch16_224",), "error: model.name: timm has no architecture 'vit_tinny_patch16_224'; did"),
        (("./nowhere",), "error: model.name: no folder './nowhere'"),
        (("owner/model",), "could not be reached on the Hub"),
        (("timm/resnet18", "--granularity", "chanel"), "error: granularity: 'chanel' is nothing that can be removed"),
        (("timm/resnet18", "--set", "model.nme=x"), "error: model.nme: unknown key; did you mean 'name'?"),
        (("timm/resnet18", "--set", "pruning.seed=1"), "error: --set pruning: only `model` has keys here"),
        (("tests.training.setup:PlainNet", "--input-shape", "1,x"), "error: --input-shape: '1,x' is no shape"),
        (("tests.training.setup:PlainNet", "--input-shape", "3,8,8"), "can't"),
    ],
)
def test_inspect_answers_bad_input_in_one_line(arguments, message):
    done = inspect(*arguments)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert message in line


def test_inspect_takes_modules_of_ones_own():
    done = inspect("tests.training.setup:PlainNet", "--input-shape", "1,8,8", "--granularity", "channel")
    assert done.returncode == 0, done.stderr
    assert "conv" in done.stdout and "16" in done.stdout


def test_verify_command(tmp_path):
    assert call("--recipe", str(write_recipe(tmp_path))).returncode == 0
    verify = [sys.executable, "-m", "hfprune.cli", "verify"]
    good = subprocess.run([*verify, str(tmp_path / "run")], capture_output=True, text=True, env=ENVIRONMENT)
    assert good.returncode == 0 and "tensors match their records, 50.00% of" in good.stdout
    weights = load_file(tmp_path / "run" / "model.safetensors")
    name = next(name for name, value in weights.items() if value.ndim > 1 and (value == 0).any())
    weights[name].view(-1)[weights[name].view(-1).nonzero()[:2]] = 0.0
    save_file(weights, tmp_path / "run" / "model.safetensors", metadata={"format": "pt"})
    more = subprocess.run([*verify, str(tmp_path / "run")], capture_output=True, text=True, env=ENVIRONMENT)
    assert more.returncode == 0 and "are zero; 2 more than recorded" in more.stdout
    bad = subprocess.run([*verify, str(tmp_path)], capture_output=True, text=True, env=ENVIRONMENT)
    assert bad.returncode == 2 and "is not a checkpoint" in bad.stderr
