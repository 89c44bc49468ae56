"""PruningTrainer with factored weights: smaller before each phase, resumable, a family of sizes from one run."""

from __future__ import annotations

import json
from io import StringIO

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForImageClassification

import hfprune
from hfprune import PruningConfig, Recipe
from hfprune.checkpoint import read_block
from hfprune.checkpoint.metadata import plan_of
from hfprune.errors import ConfigError
from hfprune.lowrank.factor import factored_layers
from hfprune.pipeline import prepare_run, run
from hfprune.preview import preview
from tests.test_pipeline import recipe_values
from tests.training.setup import make_trainer, tiny_vit
from tests.training.test_removal import Watch, parameters, plain
from tests.training.test_resume import StopAt, assert_same, outcome

RANKS = {"granularity": "rank", "target": {"params": 0.5}, "round_to": 1}
MIXED = RANKS | {"granularity": ["head", "neuron", "rank"], "target": {"macs": 0.5}}
FAMILY = {"granularity": "rank", "target": None, "schedule": {}, "export_sizes": [0.8, 0.6, 0.4], "round_to": 1}


@pytest.mark.parametrize(("build", "pruning"), [(plain, RANKS), (tiny_vit, MIXED)])
def test_the_model_gets_smaller_before_each_phase(tmp_path, build, pruning):
    watch, model = Watch(), build()
    dense = parameters(model)
    trainer = make_trainer(tmp_path, model, pruning=pruning, callbacks=[watch])
    trainer.train()
    assert dense > watch.sizes[0] > watch.sizes[1] == parameters(trainer.model)
    assert [step.params for step in trainer.steps] == watch.sizes
    assert 0.5 <= round(trainer.achieved, 6) < 0.55  # whole components: never more is left than asked
    assert factored_layers(trainer.model) and plan_of(trainer.model).factored
    trainer.save_model(str(tmp_path / "saved"))
    loaded = hfprune.from_pretrained(tmp_path / "saved", None if build is tiny_vit else build)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


RUNS = {
    "taylor with heads": (tiny_vit, MIXED | {"criterion": "taylor"}, 7),
    "family": (plain, FAMILY | {"criterion": {"name": "whitening", "batches": 2}, "recovery": {"epochs": 1}}, 6),
}


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, name):
    build, pruning, step = RUNS[name]
    options = {"pruning": pruning, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "whole", build(), **options)
    whole.train()
    expected = outcome(whole)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "stopped", build(), **options, callbacks=[StopAt(step)]).train()
    resumed = make_trainer(tmp_path / "stopped", build(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(outcome(resumed), expected)
    assert [s.params for s in resumed.steps] == [s.params for s in whole.steps]
    again = make_trainer(tmp_path / "whole", build(), **options)
    again.train(resume_from_checkpoint=True)  # ended: taken up without training
    assert_same(outcome(again), expected)


def test_an_optimizer_of_ones_own_follows(tmp_path):
    model = plain()
    norms, rest = list(model.norm.parameters()), [*model.conv.parameters(), *model.fc.parameters()]
    optimizer = torch.optim.SGD([{"params": norms, "lr": 0.01}, {"params": rest}], lr=0.1, momentum=0.9)
    watch = Watch()
    trainer = make_trainer(tmp_path, model, pruning=RANKS, optimizers=(optimizer, None), callbacks=[watch])
    trainer.train()
    assert watch.sizes[1] == parameters(model)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.norm.parameters()}
    assert factored_layers(model) and all(p in optimizer.state for p in model.parameters())


def test_a_target_that_can_t_be_reached_is_refused_before_training(tmp_path):
    model = tiny_vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for sizes in ([0.5, 0.02], [0.02]):
        with pytest.raises(ConfigError, match="target.params: 2.00% of the dense model can't be reached") as caught:
            make_trainer(tmp_path, model, pruning=FAMILY | {"export_sizes": sizes})
        assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_run_leaves_every_size(tmp_path):
    model = tiny_vit()
    dense = parameters(model)
    trainer = make_trainer(tmp_path, model, pruning=FAMILY | {"criterion": "singular_value", "recovery": {"epochs": 0}})
    trainer.train()
    members = {}
    for size, step in zip((0.8, 0.6, 0.4), trainer.steps, strict=True):
        member = AutoModelForImageClassification.from_pretrained(tmp_path / "sizes" / f"{size}")
        assert parameters(member) == step.params == pytest.approx(size * dense, rel=0.03)
        assert read_block(tmp_path / "sizes" / f"{size}")["pruning"]["reached"]["params"] == pytest.approx(
            size, abs=0.02
        )
        members[size] = factored_layers(member)
    # The small ones are nested in the large ones: what a larger one has more is at right angles to them.
    for large, small in ((0.8, 0.6), (0.6, 0.4)):
        for path, layer in members[large].items():
            inner = members[small][path].product().flatten(1)
            rest = layer.product().flatten(1) - inner
            assert (inner.t() @ rest).abs().max() < 1e-5 and (inner @ rest.t()).abs().max() < 1e-5


def test_members_are_stored_as_the_recipe_says(tmp_path):
    values = family_recipe(tmp_path / "run").model_dump(mode="json", exclude_unset=True)
    values["output"] |= {"remote_code": True, "sparse": "bitmask"}
    assert prepare_run(Recipe.parse(values)).trainer.saving == {"remote_code": True, "sparse": "bitmask"}
    pruning = FAMILY | {"criterion": "singular_value", "export_sizes": [0.6], "recovery": {"epochs": 0}}
    trainer = make_trainer(tmp_path / "code", tiny_vit(), pruning=pruning)
    trainer.saving = {"remote_code": True}
    trainer.train()
    assert list((tmp_path / "code" / "sizes" / "0.6").glob("*.py"))
    model = plain()
    hfprune.prune(model, PruningConfig(target=0.8))
    trainer = make_trainer(
        tmp_path / "zeros", model, pruning=pruning | {"granularity": "channel", "criterion": "l1", "round_to": 1}
    )
    trainer.saving = {"sparse": "bitmask"}
    trainer.train()
    folder = tmp_path / "zeros" / "sizes" / "0.6"
    assert "encodings" in read_block(folder)
    assert torch.equal(hfprune.from_pretrained(folder, plain).fc.weight, trainer.model.fc.weight)


def test_a_family_of_removals(tmp_path):
    pruning = FAMILY | {"granularity": "channel", "export_sizes": [0.8, 0.5], "recovery": {"steps": 2}}
    trainer = make_trainer(tmp_path, plain(), pruning=pruning)
    trainer.train()
    sizes = [parameters(hfprune.from_pretrained(tmp_path / "sizes" / name, plain)) for name in ("0.8", "0.5")]
    assert sizes == [step.params for step in trainer.steps]


def family_recipe(folder, **pruning):
    values = recipe_values(folder)
    values["pruning"] = {
        "criterion": "singular_value",
        "granularity": "rank",
        "export_sizes": [0.8, 0.6],
        "recovery": {"epochs": 1},
        "round_to": 1,
    } | pruning
    return Recipe.parse(values)


def test_a_recipe_reports_every_size(tmp_path):
    output = StringIO()
    report = run(family_recipe(tmp_path / "run"), console=Console(file=output, width=140))
    assert [member["size"] for member in report["sizes"]] == [1.0, 0.8, 0.6]
    assert [member["params"] for member in report["sizes"][1:]] == [step["params"] for step in report["steps"]]
    assert report["sizes"][0]["metric"] == report["dense"]["metric"]
    assert report["sizes"][-1]["metric"] == report["steps"][-1]["metric"]
    assert report["sizes"][-1]["params"] == report["pruned"]["params"]
    shown = output.getvalue()
    assert "batch 2 (faster)" in shown and "0.8 " in shown
    card = (tmp_path / "run" / "README.md").read_text()
    assert "components of weights that are now products of two" in card
    assert "The same run left checkpoints of 2 sizes: 80.00 % (accuracy" in card
    assert "one for each exported size" in card and "import hfprune" in card
    table = card.partition("## Sizes")[2].partition("##")[0]
    for member in report["sizes"][1:]:
        row = next(line for line in table.splitlines() if f"| {member['folder']} |" in line)
        assert f"{member['params']:,}" in row and member["folder"] == f"sizes/{member['size']:g}"
    assert [member.get("tag") for member in report["sizes"]] == [None] * 3
    for name in ("", "sizes/0.8", "sizes/0.6"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "run" / name)
    again = Recipe.from_yaml(tmp_path / "run" / "recipe.yaml")
    assert again.pruning == family_recipe(tmp_path / "run").pruning
    assert json.loads((tmp_path / "run" / "pruning_report.json").read_text())["sizes"] == report["sizes"]


def test_a_dry_run_shows_the_ranks_and_changes_nothing(tmp_path):
    trainer = prepare_run(family_recipe(tmp_path / "run")).trainer
    before = [type(module) for module in trainer.model.modules()]
    output = StringIO()
    Console(file=output, width=120).print(preview(trainer))
    assert "rank" in output.getvalue() and "parameters removed" in output.getvalue()
    assert [type(module) for module in trainer.model.modules()] == before


def test_a_size_that_can_t_be_reached_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="pruning.target.params: 1.00% of the dense model can't be reached"):
        run(family_recipe(tmp_path / "run", export_sizes=[0.8, 0.01]), console=Console(file=StringIO()))
    assert not (tmp_path / "run").exists()
