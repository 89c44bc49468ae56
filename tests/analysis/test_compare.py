"""`hfprune compare`: the grid that it runs, shares and goes on with, what it leaves, and bad input in one line."""

import csv
import json
import shutil

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

import hfprune
from hfprune.analysis import strategies
from hfprune.analysis.strategies import compare
from hfprune.cli import app
from hfprune.data.images import ImageRows
from hfprune.errors import ConfigError, TrainingDiverged
from hfprune.folders import claimed
from hfprune.recipe import Recipe
from hfprune.training.trainer import PruningTrainer
from tests.test_pipeline import quiet, recipe_values

GRID = {"schedules": ["one_shot", "geometric"], "ratios": [0.5, 0.9], "seeds": 2, "steps": 2, "budget": 2}


def values(folder, training=None, **sections):
    sections = {
        "pruning": {"schedule": "one_shot", "recovery": {}},
        "compare": GRID,
        "baseline": {"epochs": 1},
    } | sections
    return recipe_values(folder, training={"save_strategy": "no", **(training or {})}, **sections)


def recipe(folder, **sections):
    return Recipe.parse(values(folder, **sections))


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "120"})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A grid that a user ran: its folder, and what the command printed."""
    folder = tmp_path_factory.mktemp("grid")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values(folder / "out")))
    done = call("compare", folder / "recipe.yaml")
    assert done.exit_code == 0, done.output
    return folder / "out", done.stdout


@pytest.fixture
def copied(finished, tmp_path):
    """The same grid in a folder of its own."""
    return shutil.copytree(finished[0], tmp_path / "out")


def results(folder):
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("runs/*/result.json")}


def test_what_a_grid_leaves(finished):
    folder, printed = finished
    report = json.loads((folder / "compare.json").read_text())
    assert report["metric"] == "accuracy" and report["planned"] == len(report["runs"]) == 8
    assert [(g["ratio"], g["schedule"], len(g["values"]), g["steps"]) for g in report["groups"]] == [
        *[(0.5, "one_shot", 2, 1), (0.5, "geometric", 2, 2)],
        *[(0.9, "one_shot", 2, 1), (0.9, "geometric", 2, 2)],
    ]
    assert len(report["sentences"]) == 2 and len(report["claims"]) == 5
    assert set(report["pareto"]["epochs"]) == {"0.5", "0.9"} and report["pareto"]["epochs"]["0.5"]
    assert "8/8" in printed and all(text[:30] in printed for text in report["sentences"])
    assert "saved to" in printed and "the claims of arXiv 2508.13836" in printed
    rows = list(csv.DictReader((folder / "compare.csv").open()))
    assert len(rows) == 8 and {"schedule", "ratio", "seed", "value", "optimizer_steps", "scoring_batches"} <= set(
        rows[0]
    )
    assert [float(row["value"]) for row in rows] == [run["value"] for run in report["runs"]]
    for picture in ("ratios.png", "budget.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert not list(folder.rglob("checkpoint-*")) and not list(folder.glob("runs/*/*.safetensors"))


def test_every_run_has_the_same_start_and_the_same_cost(finished):
    folder, _ = finished
    dense = json.loads((folder / "dense" / "dense.json").read_text())["metric"]["accuracy"]
    for result in results(folder).values():
        assert result["dense"] == dense
        assert (result["cost"]["optimizer_steps"], result["cost"]["epochs"]) == (8, 2.0)
        assert result["cost"]["seconds"] > 0 and result["cost"]["scoring_batches"] == 0
        assert result["achieved"] == pytest.approx(result["ratio"], abs=1e-3)


def test_only_what_is_missing_is_made_again(copied):
    before = results(copied)
    lost = sorted(before)[0]
    (copied / "runs" / lost / "result.json").unlink()
    written = {path: path.stat().st_mtime_ns for path in copied.glob("runs/*/result.json")}
    console = Console(record=True, file=open("/dev/null", "w"), width=200)  # noqa: SIM115
    compare(recipe(copied), console=console)
    assert "1 of 8 runs to make" in console.export_text()
    after = results(copied)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    for result in (before[lost], after[lost]):
        result["cost"].pop("seconds")
    assert after == before


def test_a_complete_grid_opens_nothing(copied, monkeypatch):
    monkeypatch.setattr(strategies, "prepare_run", None)
    found = compare(recipe(copied), console=quiet())
    assert found.to_dict() == json.loads((copied / "compare.json").read_text())


def test_a_grid_that_grows_keeps_its_runs(copied):
    grid = {**GRID, "ratios": [0.5], "criteria": ["l1", {"name": "taylor", "batches": 2}], "seeds": 1}
    written = {path: path.stat().st_mtime_ns for path in copied.glob("runs/*/result.json")}
    found = compare(recipe(copied, compare=grid), console=quiet())
    assert {path: path.stat().st_mtime_ns for path in written} == written
    scored = {(run["criterion"], run["schedule"]): run["cost"]["scoring_batches"] for run in found.runs}
    assert scored == {
        ("l1", "one_shot"): 0,
        ("l1", "geometric"): 0,
        ("taylor batches=2", "one_shot"): 2,
        ("taylor batches=2", "geometric"): 4,
    }


def test_a_run_that_another_process_holds_is_left_to_it(copied):
    held, free = sorted(results(copied))[:2]
    for key in (held, free):
        (copied / "runs" / key / "result.json").unlink()
    with claimed(copied / ".locks" / held) as mine:
        assert mine
        found = compare(recipe(copied), wait=False, console=quiet())
    assert (len(found.runs), found.planned) == (7, 8)
    assert set(results(copied)) == set(results(copied)) - {held} and free in results(copied)
    assert "1 of 8 runs are still to be made" in str(found.table().renderables)
    assert len(compare(recipe(copied), console=quiet()).runs) == 8


def test_a_lock_is_held_by_one_alone(tmp_path):
    with claimed(tmp_path / "lock") as first, claimed(tmp_path / "lock") as second:
        assert first and not second
    with claimed(tmp_path / "lock") as again:
        assert again


def test_all_schedules_see_the_data_in_the_same_order(copied, monkeypatch):
    seen, orders = [], {}
    take = ImageRows.__getitems__

    def spied(rows, indices):
        seen.append((rows.epoch, tuple(indices)))
        return take(rows, indices)

    def told(words, done, total):
        orders.setdefault(words, []).extend(entry for entry in seen if len(entry[1]) == 16)
        seen.clear()

    monkeypatch.setattr(ImageRows, "__getitems__", spied)
    for path in copied.glob("runs/*-0.5-*/result.json"):
        path.unlink()
    compare(recipe(copied), console=quiet(), progress=told)
    first, second = ([orders[f"l1 {one} 0.5, 2 epochs, seed {seed}"] for one in GRID["schedules"]] for seed in (3, 4))
    assert len(first[0]) == 8
    assert first[0] == first[1] and second[0] == second[1] and first[0] != second[0]


def test_an_interrupted_run_goes_on_from_its_checkpoint(copied):
    whole = {"save_strategy": "epoch"}
    one = {**GRID, "schedules": ["geometric"], "ratios": [0.7], "seeds": 1, "budget": 4}
    sections = {"compare": one, "training": whole}
    (copied / "recipe.yaml").unlink()  # the folder's dense model is as good for runs with checkpoints

    def interrupt(words, done, total):
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(recipe(copied, **sections), console=quiet(), progress=interrupt)
    assert list(copied.glob("runs/*/checkpoint-8"))
    told = []
    found = compare(recipe(copied, **sections), console=quiet(), progress=lambda words, done, total: told.append(done))
    assert told == list(range(9, 17))
    for path in copied.glob("runs/l1-geometric-0.7-*"):
        shutil.rmtree(path)
    again = compare(recipe(copied, **sections), console=quiet())
    assert again.runs[0]["value"] == found.runs[0]["value"]
    assert again.runs[0]["cost"]["optimizer_steps"] == found.runs[0]["cost"]["optimizer_steps"] == 16


def test_models_are_kept_where_that_is_asked_for(copied):
    grid = {**GRID, "schedules": ["one_shot"], "ratios": [0.6], "seeds": 1, "budget": 0}
    compare(recipe(copied, compare=grid), keep=True, console=quiet())
    (folder,) = copied.glob("runs/l1-one_shot-0.6-*")
    assert hfprune.verify(folder).ok and hfprune.from_pretrained(folder) is not None
    assert json.loads((folder / "result.json").read_text())["cost"]["optimizer_steps"] == 0


def test_patience_ends_every_step(copied):
    grid = {"schedules": ["geometric"], "ratios": [0.5], "seeds": 1, "steps": 2, "patience": 1}
    pruning = {"recovery": {"epochs": 3, "min_delta": 0.9}}
    (copied / "recipe.yaml").unlink()
    found = compare(recipe(copied, compare=grid, pruning=pruning), console=quiet())
    assert found.runs[0]["patience"] == 1 and found.runs[0]["cost"]["epochs"] == 2.0


def test_a_run_whose_loss_is_no_number_does_not_end_the_grid(copied, monkeypatch):
    for path in copied.glob("runs/l1-one_shot-0.5-*/result.json"):
        path.unlink()
    train = PruningTrainer.train

    def failing(trainer, *args, **kwargs):
        if trainer.args.seed == 3:
            raise TrainingDiverged("the loss became nan at step 1")
        return train(trainer, *args, **kwargs)

    monkeypatch.setattr(PruningTrainer, "train", failing)
    found = compare(recipe(copied), console=quiet())
    failed = [group for group in found.groups if group.failed]
    assert [(group.schedule, group.ratio, len(group.values)) for group in failed] == [("one_shot", 0.5, 1)]


def test_channels_are_compared_too(copied):
    grid = {"schedules": ["geometric"], "ratios": [0.2], "seeds": 1, "steps": 2, "budget": 0}
    pruning = {"granularity": "neuron", "target": {"params": 0.7}, "round_to": 1, "recovery": {}}
    (copied / "recipe.yaml").unlink()
    (run,) = compare(recipe(copied, compare=grid, pruning=pruning), console=quiet()).runs
    assert run["measured"] == "params" and run["removal"] and run["achieved"] == pytest.approx(0.2, abs=0.03)


def test_a_dry_run_shows_the_runs_and_opens_nothing(copied, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values(copied)))
    done = call("compare", path, "--dry-run", "--ratios", ".5,.7", "--set", "model.name=timm/resnet18")
    assert done.exit_code == 2 and "model.name: 'timm/resnet18' now, but the runs in" in done.stderr
    done = call("compare", path, "--dry-run", "--ratios", ".5,.7")
    assert done.exit_code == 0 and "8 runs, 2 of each, 4 complete" in done.stdout and "70.0%" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ratios", "80"), "compare.ratios: 80 must be the fraction that goes, between 0 and 1; 80 % is 0.8"),
        (("--ratios", "half"), "compare.ratios.0: input should be a valid number, not 'half'"),
        (("--schedules", "oneshot"), "unknown schedule 'oneshot'; did you mean 'one_shot'?"),
        (("--criteria", "tailor"), "unknown criterion 'tailor'; did you mean 'taylor'?"),
        (("--budget", "2", "--patience", "2"), "compare.patience: give either budget or patience, not both"),
        (("--set", "compare.budget=null"), "compare.budget: missing"),
        (("--budget", ".2"), "compare.budget: 0.2 epochs are 1 optimizer steps, too few for the 2 pruning steps"),
        (("--patience", "1", "--set", "pruning.recovery.monitor=f1"), "pruning.recovery.monitor: 'f1' is not measured"),
        (
            ("--patience", "1", "--set", "pruning.recovery.min_delta=2"),
            "min_delta: 2, but accuracy lies between 0 and 1",
        ),
        (("--set", "data.eval_fraction=.0"), "data.eval_fraction: "),
        (("--set", "training.seed=one"), "training.seed: must be a whole number, not 'one'"),
        (("--seeds", "40"), "160 runs of 1,280 optimizer steps in all would take about"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values(tmp_path / "out")))
    done = call("compare", path, *arguments)
    assert done.exit_code == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "out").exists()


def test_a_large_grid_says_its_cost_by_the_runs_that_are_done(copied):
    with pytest.raises(ConfigError, match=r"--yes: 72 runs of 576 optimizer steps .*by the runs that are done"):
        compare(recipe(copied, compare={**GRID, "seeds": 20}), console=quiet())


def test_a_launcher_s_processes_are_refused(copied, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="start the command several times, and they share the grid"):
        compare(recipe(copied), console=quiet())


def test_it_has_a_public_name():
    assert hfprune.compare is hfprune.analysis.compare is compare


def test_a_result_that_can_t_be_read_is_named(copied):
    path = next(copied.glob("runs/*/result.json"))
    path.write_text("{")
    with pytest.raises(hfprune.HfpruneError, match="delete it, and the run is made again"):
        compare(recipe(copied), console=quiet())
