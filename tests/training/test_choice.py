"""`schedule: auto`: the schedule by the kind of model and the length of its fine-tuning, and what is said of it."""

import pytest
from transformers import TrainingArguments

import hfprune
from hfprune import PruningConfig, Recipe
from hfprune.errors import ConfigError
from hfprune.pipeline import run
from hfprune.schedules import advise
from hfprune.training.choice import decide, family_of
from tests.support.models import TINY
from tests.test_pipeline import quiet, recipe_values


@pytest.mark.parametrize(
    ("model", "family"),
    [
        *[("cnn", "convolutional"), ("timm_resnet", "convolutional"), ("mlp", "other"), ("lstm", "other")],
        *[("vit", "transformer"), ("timm_vit", "transformer"), ("gpt2", "language"), ("bert", "language")],
    ],
)
def test_the_kind_of_a_model(model, family):
    assert family_of(TINY[model].build()) == family


@pytest.mark.parametrize(
    ("family", "ratio", "epochs", "removal", "kind"),
    [
        ("convolutional", 0.7, 3, False, "one_shot"),
        ("convolutional", 0.7, 300, False, "one_shot"),
        ("convolutional", 0.8, 3, False, "geometric"),
        ("convolutional", 0.92, 30, False, "hybrid"),
        ("convolutional", 0.5, 3, True, "geometric"),
        ("transformer", 0.5, 3, False, "geometric"),
        ("transformer", 0.5, 10, False, "hybrid"),
        ("language", 0.5, 30, False, "geometric"),
        ("other", 0.5, 3, False, "geometric"),
    ],
)
def test_what_the_findings_speak_for(family, ratio, epochs, removal, kind):
    found, reason = advise(family, ratio, epochs, removal=removal)
    assert found == kind and reason


def decided(tmp_path, model="cnn", rows=range(100), **pruning):
    arguments = TrainingArguments(str(tmp_path), num_train_epochs=4, per_device_train_batch_size=10, use_cpu=True)
    return decide(PruningConfig(schedule="auto", **pruning), TINY[model].build(), arguments, rows)


def test_the_length_of_a_phase_counts(tmp_path):
    for recovery, kind in (
        ({}, "geometric"),
        ({"epochs": 12}, "hybrid"),
        ({"epochs": [12, 1]}, "hybrid"),
        ({"steps": 50}, "geometric"),
        ({"steps": 100}, "hybrid"),
    ):
        config, words = decided(tmp_path, target=0.9, recovery=recovery)
        assert config.schedule.kind == kind and words.startswith(f"schedule auto: {kind}, because at 80% and above")
    config, _ = decided(tmp_path, granularity="channel", target={"macs": "1M"})
    assert config.schedule.kind == "geometric"


def test_what_else_the_schedule_says_is_kept(tmp_path):
    steps = {"kind": "auto", "steps": 7}
    model, arguments = TINY["cnn"].build(), TrainingArguments(str(tmp_path), use_cpu=True)
    config, _ = decide(PruningConfig(target=0.9, schedule=steps), model, arguments, None)
    assert len(config.targets()) == 7
    config, _ = decide(PruningConfig(target=0.5, schedule=steps), model, arguments, None)
    assert config.schedule.model_dump(exclude_unset=True) == {"kind": "one_shot"}
    given = PruningConfig(target=0.9, schedule="constant")
    assert decide(given, model, arguments, None) == (given, "")
    with pytest.raises(ConfigError, match="only the hybrid schedule has a first step of its own, not 'auto'"):
        Recipe.parse(recipe_values(tmp_path, pruning={"schedule": {"kind": "auto", "first": 0.3}}))


def test_a_run_says_what_it_chose_and_why(tmp_path):
    console = quiet()
    console.record = True
    values = recipe_values(
        tmp_path / "run", pruning={"schedule": {"kind": "auto", "steps": 2}, "recovery": {"epochs": 1}}
    )
    report = run(Recipe.parse(values), console=console)
    sentence = "schedule auto: geometric, because for transformers small steps were found better than one"
    assert sentence in " ".join(console.export_text().split())
    assert report["schedule_choice"].startswith(sentence) and len(report["steps"]) == 2
    assert report["recipe"]["pruning"]["schedule"]["kind"] == "geometric"
    assert "schedule `geometric`" in (tmp_path / "run" / "README.md").read_text()
    assert run(Recipe.parse(values), resume=True, console=quiet()) == report


def test_without_training_there_is_one_step():
    model = TINY["cnn"].build()
    report = hfprune.prune(model, PruningConfig(target=0.9, schedule="auto"))
    assert report.achieved == pytest.approx(0.9, abs=0.01)
