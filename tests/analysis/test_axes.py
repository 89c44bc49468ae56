"""Methods beside each other: what they mean for a model, what a grid of them leaves, its claims, and bad input."""

import csv
import json
import shutil

import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner

import hfprune
from hfprune.analysis import strategies
from hfprune.analysis.axes import AxesComparison
from hfprune.analysis.axes_claims import AxesGroup, claims
from hfprune.analysis.methods import applicable, fitted
from hfprune.analysis.strategies import compare
from hfprune.analysis.verdicts import Measure
from hfprune.cli import app
from hfprune.config import PruningConfig
from hfprune.errors import ConfigError
from hfprune.grid import Grid, overrides_of
from hfprune.recipe import Recipe
from tests.test_pipeline import quiet, recipe_values

PERPLEXITY = Measure("perplexity", False, 10.0, False)
GRID = {
    "methods": ["unstructured", "structured", "low_rank"],
    "criteria": ["taylor"],
    "schedules": ["one_shot"],
    "sizes": [0.6],
    "seeds": 1,
    "steps": 2,
    "budget": 1,
}


def values(folder, **sections):
    sections = {
        "pruning": {"schedule": "one_shot", "recovery": {}, "round_to": 1},
        "compare": GRID,
        "baseline": {"epochs": 1},
    } | sections
    return recipe_values(folder, training={"save_strategy": "no"}, **sections)


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})


def cells(pruning=None, **grid):
    base = PruningConfig(**{"target": 0.5, **(pruning or {})})
    return Grid(**{"budget": 1, "seeds": 1, "schedules": ["one_shot"], **grid}).cells(base, 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A grid of methods that a user ran: its folder, and what the command printed."""
    folder = tmp_path_factory.mktemp("axes")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values(folder / "out")))
    done = call("compare", folder / "recipe.yaml")
    assert done.exit_code == 0, done.output
    return folder / "out", done.stdout


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "out")


# ---- what a method means --------------------------------------------------------------------------------------------


def test_bare_names_are_the_three_known_methods():
    found = cells(methods=["unstructured", "structured", "low_rank"], sizes=[0.4])
    said = [(c.method.name, c.pruning.granularity, c.criterion, c.pruning.target.kind) for c in found]
    assert said == [
        *[("unstructured", "weight", name, "ratio") for name in ("l1", "wanda", "taylor")],
        *[("structured", ["head", "neuron"], name, "params") for name in ("l1", "wanda", "taylor")],
        *[("low_rank", "rank", name, "params") for name in ("singular_value", "whitening")],
    ]
    assert {(c.ratio, c.size, c.pruning.targets()[-1]) for c in found} == {(0.6, 0.4, 0.6)}
    assert found[0].words == "unstructured l1 one_shot at 0.4, 1 epochs, seed 0"
    assert found[0].key.startswith("unstructured-l1-one_shot-0.4-1ep-seed0-")
    assert {c.size for c in cells(methods=["low_rank"])} == {0.7, 0.5, 0.3}


def test_a_method_of_one_s_own_and_its_kind():
    methods = [
        {"name": "tiles", "granularity": "block:2x2"},
        {"name": "both", "granularity": ["neuron", "rank"], "criteria": ["taylor"]},
        {"name": "thin", "granularity": "width"},
    ]
    found = cells({"criterion": "l2"}, methods=methods, sizes=[0.5])
    assert [(c.method.kind, c.criterion) for c in found] == [
        ("unstructured", "l2"),
        ("low_rank", "taylor"),
        ("structured", "l2"),
    ]
    assert len({c.key for c in found}) == 3


def test_a_criterion_that_does_not_apply_is_left_out_and_said():
    every = ["unstructured", "low_rank"]
    kept, notes = applicable(cells(methods=every, criteria=["l1", "wanda", "whitening"], sizes=[0.5]))
    pairs = [(c.method.name, c.criterion) for c in kept]
    assert pairs == [
        ("unstructured", "l1"),
        ("unstructured", "wanda"),
        ("low_rank", "l1"),
        ("low_rank", "whitening"),
    ]
    assert [note.partition(":")[0] for note in notes] == ["unstructured without whitening", "low_rank without wanda"]


def test_a_size_of_zeros_counts_the_whole_model():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 20))
    whole = sum(p.numel() for p in model.parameters())
    (cell,) = cells(methods=["unstructured"], criteria=["l1"], sizes=[0.6])
    report = hfprune.prune(model, fitted(cell, model))
    left = sum(int(torch.count_nonzero(p)) for p in model.parameters())
    assert report.masks.zeros == whole - left and left == pytest.approx(0.6 * whole, abs=1)
    (cell,) = cells(methods=["unstructured"], criteria=["l1"], sizes=[0.2])
    with pytest.raises(ConfigError, match=r"38.46% of the parameters are no weights to prune \(embeddings"):
        fitted(cell, model)


def test_a_convolutional_network_loses_channels_where_that_is_open():
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    (bare,) = cells(methods=["structured"], criteria=["l1"], sizes=[0.6])
    (said,) = cells(methods=[{"name": "structured", "granularity": "neuron"}], criteria=["l1"], sizes=[0.6])
    assert fitted(bare, network).granularity == "channel" and fitted(said, network).granularity == "neuron"
    attention = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    assert fitted(bare, attention).granularities == ["head", "neuron"]


# ---- a grid of them -------------------------------------------------------------------------------------------------


def test_what_a_grid_of_methods_leaves(finished):
    folder, printed = finished
    report = json.loads((folder / "compare.json").read_text())
    assert len(report["groups"]) == report["planned"] == 3 and len(report["claims"]) == 3
    whole = report["dense_model"]["params"]
    for run in report["runs"]:
        model = run["model"]
        assert model["nonzero"] == pytest.approx(0.6 * whole, rel=0.05) and run["size"] == 0.6
        assert set(model["latency_ms"]) == set(model["dense_latency_ms"]) == {"1", "2"}
        assert all(value > 0 for value in model["speedup"].values())
        assert (model["params"] == whole) == (run["kind"] == "unstructured") != run["removal"]
        assert run["looks_at_data"] and run["cost"]["optimizer_steps"] == 4
    assert {tuple(run["granularity"]) for run in report["runs"]} == {("weight",), ("head", "neuron"), ("rank",)}
    assert set(report["pareto"]) == {"speed", "bytes"} and report["pareto"]["bytes"]
    rows = list(csv.DictReader((folder / "compare.csv").open()))
    named = {"method", "criterion", "schedule", "size", "nonzero", "bytes", "speedup_batch_2", "seconds"}
    assert len(rows) == 3 and named <= set(rows[0])
    for picture in ("sizes.png", "speed.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert "the claims of arXiv 2310.03424 on these runs" in printed and "low_rank" in printed
    # Nothing of what was weighed stays.
    assert not list(folder.glob("runs/**/*.safetensors")) and not list(folder.glob("tmp*"))


def test_zeros_are_stored_as_bitmasks_on_disk(copied):
    grid = {**GRID, "methods": ["unstructured"], "criteria": ["l1"], "schedules": ["one_shot"], "sizes": [0.25]}
    recipe = Recipe.parse(values(copied, compare=grid))
    (run,) = compare(recipe, keep=True, console=quiet()).runs
    assert run["model"]["bytes"] < 0.7 * run["model"]["dense"]["bytes"]
    (kept,) = copied.glob("runs/unstructured-l1-one_shot-0.25-*")
    assert hfprune.verify(kept).ok


def test_a_complete_grid_of_methods_opens_nothing(copied, monkeypatch):
    monkeypatch.setattr(strategies, "prepare_run", None)
    found = compare(Recipe.parse(values(copied)), console=quiet())
    assert isinstance(found, AxesComparison)
    assert found.to_dict() == json.loads((copied / "compare.json").read_text())


def test_a_dry_run_shows_methods_and_what_is_left_out(copied, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values(copied)))
    done = call("compare", path, "--dry-run", "--criteria", "taylor,wanda", "--sizes", ".6,.4")
    assert done.exit_code == 0 and "10 runs, 1 of each, 3 complete" in done.stdout
    assert "low_rank without wanda: 'wanda' can't score the components of factored weights" in done.stdout


def test_a_run_that_failed_has_no_model_and_a_row(finished):
    runs = json.loads((finished[0] / "compare.json").read_text())["runs"]
    lost = {key: value for key, value in runs[0].items() if key != "model"} | {"value": None, "failed": "nan"}
    found = AxesComparison([lost, *runs[1:]], 3)
    (group,) = [group for group in found.groups if group.failed]
    assert group.values == () and group.nonzero is None and found.to_dict()["groups"] and found.table() is not None
    assert "nan" in found.to_csv()


# ---- claims -----------------------------------------------------------------------------------------------------


def group(method, criterion, schedule, size, mean, speed=1.0, by=0.1):
    kinds = {"unstructured": "unstructured", "low_rank": "low_rank"}
    data = criterion in ("taylor", "whitening", "wanda")
    costs = {"epochs": 1.0, "optimizer_steps": 1.0, "seconds": 1.0, "scoring_batches": 0.0}
    more = {"size": size, "looks_at_data": data, "speedup": {"1": 9.0, "16": speed}}
    own = {"method": method, "kind": kinds.get(method, "structured"), **more}
    values = (mean - by, mean, mean + by) if by else (mean,)
    return AxesGroup(criterion, schedule, 1 - size, "1 epochs", values, costs, **own)


def verdicts(*groups):
    return [claim.verdict for claim in claims(PERPLEXITY, groups)]


def test_data_beats_magnitude_in_several_scenarios():
    groups = [
        group(method, criterion, "one_shot", size, 20 if criterion == "l1" else 15)
        for method in ("unstructured", "structured")
        for size in (0.5, 0.3)
        for criterion in ("l1", "taylor")
    ]
    assert verdicts(*groups)[0] == "confirmed" and verdicts(*groups[:4])[0] == "undecided"
    numbers = claims(PERPLEXITY, groups)[0].numbers
    assert numbers.startswith("unstructured 2 for, 0 against of 2; structured 2 for, 0 against of 2; in all 4 of 4")
    worse = [group("low_rank", name, "one_shot", 0.5, m) for name, m in (("singular_value", 15), ("whitening", 20))]
    assert verdicts(*worse)[0] == "not confirmed"
    assert verdicts(*groups, *worse)[0] == "confirmed"
    assert claims(PERPLEXITY, groups[::2])[0].numbers.startswith("nothing here tests it")


def test_incremental_is_to_gain_most_at_small_sizes():
    def grid(*gains):
        for size, gain in gains:
            yield group("structured", "l1", "one_shot", size, 20)
            yield group("structured", "l1", "geometric", size, 20 - gain)

    assert verdicts(*grid((0.7, 1), (0.3, 4)))[1] == "confirmed"
    assert verdicts(*grid((0.7, 4), (0.3, 1)))[1] == "undecided"
    assert verdicts(*grid((0.7, -1), (0.3, -4)))[1] == "not confirmed"
    numbers = claims(PERPLEXITY, list(grid((0.7, 1), (0.3, 4))))[1].numbers
    assert numbers.startswith("mean gain over one-shot +20.0 % at 0.3, +5.0 % at 0.7; 2 of 2 comparisons for it")


def test_low_rank_is_to_be_better_in_one_and_no_worse_in_the_other():
    other = group("structured", "l1", "one_shot", 0.7, 15, 1.3)

    def against(mean, speed, by=0.1):
        return verdicts(other, group("low_rank", "whitening", "one_shot", 0.7, mean, speed, by))[2]

    assert against(12, 1.3) == against(15, 2.0) == against(12, 2.0) == "confirmed"
    assert against(18, 1.3) == against(15, 1.0) == "not confirmed"
    assert against(12, 1.0) == against(18, 2.0) == against(15, 1.31) == "undecided"
    assert against(12, 2.0, by=0) == "undecided"  # one seed
    noisy = group("unstructured", "l1", "one_shot", 0.7, 40, 1.6)  # zeros speed nothing up: so far do times stray
    assert verdicts(other, noisy, group("low_rank", "whitening", "one_shot", 0.7, 15, 2.0))[2] == "undecided"
    small = [group("structured", "l1", "one_shot", 0.3, 15), group("low_rank", "whitening", "one_shot", 0.3, 9)]
    assert verdicts(*small)[2] == "undecided"


# ---- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "low_rnk"), "compare.methods.0: unknown method 'low_rnk'; did you mean 'low_rank'?"),
        (("--methods", "low_rank,low_rank"), "compare.methods: 'low_rank' stands twice"),
        (("--sizes", "70"), "compare.sizes: 70 must be the fraction that is left, between 0 and 1; 70 % is 0.7"),
        (("--ratios", ".5"), "compare.ratios: methods are compared at sizes"),
        (("--set", "compare.methods=null"), "compare.sizes: need methods, such as [unstructured"),
        (("--criteria", "whitening"), "compare.criteria: none of them can score what 'unstructured' removes"),
        (("--criteria", "tailor"), "unknown criterion 'tailor'; did you mean 'taylor'?"),
        (("--sizes", ".05"), "compare.methods.unstructured at 0.05: "),
        (("--sizes", ".05", "--methods", "low_rank"), "compare.methods.low_rank at 0.05: pruning.target.params: 5.00%"),
        (("--sizes", ".01", "--methods", "structured"), "compare.methods.structured at 0.01: "),
        (
            ("--set", "compare.methods=[{name: low_rank, criteria: [wanda]}]"),
            "compare.methods.low_rank.criteria: 'wanda' can't score the components",
        ),
        (
            ("--set", "compare.methods=[{name: half, granularity: '2:4'}]"),
            "compare.methods.0.granularity: 2:4 fixes what goes",
        ),
        (
            ("--set", "pruning.granularity=neuron", "--set", "pruning.scope=isomorphic"),
            "compare.methods.unstructured.scope: isomorphic is for structural",
        ),
        (("--set", "data.eval_fraction=.0"), "data.eval_fraction: "),
        (
            ("--budget", ".2", "--schedules", "geometric"),
            "compare.budget: 0.2 epochs are 1 optimizer steps, too few for the 2 pruning steps",
        ),
        (
            ("--patience", "1", "--set", "pruning.recovery.min_delta=2"),
            "min_delta: 2, but accuracy lies between 0 and 1",
        ),
        (("--patience", "1", "--set", "pruning.recovery.monitor=f1"), "pruning.recovery.monitor: 'f1' is not measured"),
        (("--seeds", "25"), "75 runs of 300 optimizer steps in all would take about"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values(tmp_path / "out")))
    done = call("compare", path, *arguments)
    assert done.exit_code == 2, done.output
    (line,) = [line for line in done.stderr.strip().splitlines() if line.startswith("error")]
    assert message in line and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_options_of_methods_become_overrides():
    said = ["compare.methods=[low_rank]", "compare.sizes=[.5]", "compare.ratios=null"]
    assert overrides_of(methods="low_rank", sizes=".5") == said
