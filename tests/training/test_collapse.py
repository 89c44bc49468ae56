"""max_drop: a step that ends too far behind the dense model stops the schedule, or sends it back."""

from __future__ import annotations

import pytest
import torch

from hfprune.errors import Collapsed, ConfigError
from hfprune.training.trainer import PruningTrainer
from tests.training.setup import make_trainer
from tests.training.test_resume import StopAt, assert_same, outcome

NEURONS = {"granularity": "neuron", "round_to": 1}


def trainer_that_falls(folder, beyond: float, pruning: dict | None = None, **options) -> PruningTrainer:
    """A trainer whose accuracy is 0.9 as long as no more than a fraction is gone, and 0.5 from there on."""
    recovery = {"epochs": 1, "max_drop": 3, "monitor": "accuracy"} | (pruning or {}).pop("recovery", {})
    wanted = {"schedule": {"kind": "constant", "steps": 4}, "recovery": recovery} | (pruning or {})
    made = make_trainer(folder, pruning=wanted, **options)
    made.compute_metrics = lambda _: {"accuracy": 0.5 if made.achieved > beyond + 1e-3 else 0.9}
    return made


@pytest.mark.parametrize("what", [{}, NEURONS], ids=["masks", "removal"])
def test_rolls_back_to_the_last_step_that_held(tmp_path, what):
    longer = trainer_that_falls(tmp_path / "long", 0.5, {**what})
    longer.train()
    shorter = make_trainer(
        tmp_path / "short",
        pruning={
            **what,
            "target": 0.4,
            "schedule": {"kind": "constant", "steps": 2},
            "recovery": {"epochs": 1, "monitor": "accuracy"},
        },
    )
    shorter.compute_metrics = lambda _: {"accuracy": 0.9}
    shorter.train()
    assert [step.target for step in longer.steps] == pytest.approx([0.2, 0.4])
    assert longer.masks.digest() == shorter.masks.digest()
    weights = shorter.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in longer.model.state_dict().items())
    assert longer.steps[-1].note.startswith(
        "the schedule ended with the step before: 60.0% pruned: accuracy 50.0%"
        if not what
        else "the schedule ended with the step before: "
    )
    (collapse,) = longer.progress.collapses
    assert collapse["target"] == pytest.approx(0.6)
    assert collapse["drop"] == pytest.approx(0.4) and collapse["followed"] == "rollback"


def test_stop_keeps_the_step(tmp_path):
    trainer = trainer_that_falls(tmp_path, 0.5, {"recovery": {"on_collapse": "stop"}})
    trainer.train()
    assert [step.target for step in trainer.steps] == pytest.approx([0.2, 0.4, 0.6])
    assert trainer.achieved == pytest.approx(0.6, abs=1e-3)
    assert "accuracy 50.0% is 40.00 points behind the dense model's, more than 3 points" in trainer.steps[-1].note


@pytest.mark.parametrize("what", [{}, NEURONS], ids=["masks", "removal"])
def test_halved_steps_come_as_near_as_an_eighth(tmp_path, what):
    trainer = trainer_that_falls(tmp_path, 0.56, {**what, "recovery": {"on_collapse": "halve_step"}})
    trainer.train()
    assert [step.target for step in trainer.steps] == pytest.approx([0.2, 0.4, 0.5, 0.55])
    assert [collapse["target"] for collapse in trainer.progress.collapses] == pytest.approx([0.6, 0.6, 0.6, 0.575])
    assert [collapse["followed"] for collapse in trainer.progress.collapses] == [
        "halved to 0.5",
        "halved to 0.55",
        "halved to 0.575",
        "halve_step",
    ]


def test_a_first_step_can_be_halved(tmp_path):
    trainer = trainer_that_falls(
        tmp_path, 0.5, {"target": 0.8, "schedule": "one_shot", "recovery": {"on_collapse": "halve_step"}}
    )
    trainer.train()
    assert [step.target for step in trainer.steps] == pytest.approx([0.4, 0.5])


@pytest.mark.parametrize("what", [{}, NEURONS], ids=["masks", "removal"])
def test_where_no_step_held_the_model_is_dense_again(tmp_path, what):
    trainer = trainer_that_falls(tmp_path, 0.1, {**what, "schedule": "one_shot"})
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(Collapsed, match="max_drop: .*no step before it held: the model is dense again"):
        trainer.train()
    after = trainer.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("way", ["rollback", "halve_step"])
@pytest.mark.parametrize("what", [{}, NEURONS], ids=["masks", "removal"])
def test_an_interrupted_run_goes_the_same_way(tmp_path, way, what):
    options = {"beyond": 0.5, "pruning": {**what, "recovery": {"on_collapse": way}}, "save_strategy": "steps"}
    whole = trainer_that_falls(tmp_path / "whole", **options, save_steps=1)
    whole.train()
    for step in (6, 11):
        folder = tmp_path / str(step)
        options["pruning"] = {**what, "recovery": {"on_collapse": way}}
        stopped = trainer_that_falls(folder, **options, save_steps=1, callbacks=[StopAt(step)])
        with pytest.raises(KeyboardInterrupt):
            stopped.train()
        options["pruning"] = {**what, "recovery": {"on_collapse": way}}
        resumed = trainer_that_falls(folder, **options, save_steps=1)
        resumed.train(resume_from_checkpoint=True)
        assert_same(outcome(resumed), outcome(whole))
        assert len(resumed.progress.collapses) == len(whole.progress.collapses)


@pytest.mark.parametrize(
    ("pruning", "more", "message"),
    [
        ({"recovery": {"max_drop": 0.03}}, {}, "0.03 is no number of percentage points .write 3 for 0.03 of 1"),
        ({"recovery": {"max_drop": 3}}, {}, "max_drop: 'loss' is watched, which has no percentage points"),
        ({"recovery": {"max_drop": {"relative": 5}}}, {}, "5 is no fraction; write 0.05 for 5 %"),
        ({"recovery": {"max_drop": {"relative": 0.1}}}, {"eval_dataset": None}, "max_drop: needs an eval_dataset"),
        ({"recovery": {"on_collapse": "stop"}}, {}, "on_collapse: nothing collapses without a max_drop"),
        (
            {
                "recovery": {"max_drop": 3, "monitor": "accuracy", "on_collapse": "halve_step"},
                "schedule": {"kind": "cubic", "steps": 2, "every": 3},
            },
            {},
            "on_collapse: halve_step changes the schedule's targets, which every sets",
        ),
    ],
)
def test_bad_input(tmp_path, pruning, more, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        make_trainer(tmp_path, pruning=pruning, **more)
