"""PruningConfig: shorthands, targets, and one line for whatever does not fit."""

import pytest
from pydantic import ValidationError

import hfprune
from hfprune.config import PruningConfig, Recovery, Schedule
from hfprune.errors import ConfigError
from hfprune.granularity import Granularity, parse_granularity
from hfprune.strict import one_line


def refusal(**values):
    with pytest.raises(ValidationError) as error:
        PruningConfig(**values)
    return one_line(error.value, "pruning")


def test_shorthands():
    config = PruningConfig(criterion="l2", target=0.5, schedule="geometric", include="*.fc", ignore="head")
    assert config.ratio == 0.5
    assert config.schedule.kind == "geometric"
    assert config.include == ["*.fc"]
    assert config.ignore == ["head"]
    assert config == PruningConfig(
        criterion="l2", target={"ratio": 0.5}, schedule={"kind": "geometric"}, include=["*.fc"], ignore=["head"]
    )


def test_whole_numbers_and_tuples_are_taken():
    config = PruningConfig(target=0, include=("a.*", "b"), recovery={"epochs": (3, 0.5), "learning_rate": 1})
    assert config.include == ["a.*", "b"]
    assert config.recovery.epochs == [3, 0.5]
    assert isinstance(config.recovery.learning_rate, float)


def test_it_survives_a_round_trip():
    config = PruningConfig(
        criterion={"name": "taylor", "absolute": True},
        target=0.9,
        schedule={"kind": "hybrid", "steps": 4, "first": 0.6},
        recovery={"epochs": [3, 1], "patience": 2},
        per_layer={"head": 0.2},
        min_kept=0.1,
        seed=3,
    )
    assert PruningConfig.model_validate(config.model_dump(mode="json")) == config
    assert config.criterion_name == "taylor"
    assert config.criterion_parameters == {"absolute": True}


def test_defaults():
    config = hfprune.PruningConfig(target=0)
    assert (config.criterion, config.granularity, config.scope) == ("l1", "weight", "global")
    assert config.targets() == [0.0]
    assert config.criterion_parameters == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("weight", Granularity("weight")),
        ("2:4", Granularity("n:m", kept=2, group=4)),
        ("1:16", Granularity("n:m", kept=1, group=16)),
        ("block:4x2", Granularity("block", rows=4, cols=2)),
        ("block:1x1", Granularity("block", rows=1, cols=1)),
    ],
)
def test_granularities(text, expected):
    assert parse_granularity(text) == expected


@pytest.mark.parametrize("text", ["4:4", "0:4", "5:4"])
def test_patterns_keep_some_and_not_all(text):
    with pytest.raises(ConfigError, match=f"^'{text}' must keep fewer than it groups, and at least one, e.g. 2:4$"):
        parse_granularity(text)


@pytest.mark.parametrize("text", ["weights", "block", "block:0x4", "block:4x0", "block:4", "2:4:8", "", "-2:4"])
def test_unknown_granularities(text):
    with pytest.raises(
        ConfigError,
        match=f"^unknown granularity '{text}'; known: weight, channel, head, head_dim, neuron, width, layer, rank, N:M",
    ):
        parse_granularity(text)


def test_a_pattern_says_its_ratio():
    assert PruningConfig(granularity="2:4").ratio == 0.5
    assert PruningConfig(granularity="1:4", target=0.75).targets() == [0.75]
    assert PruningConfig(granularity="1:3", target=2 / 3).ratio == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target": 0.5, "granulrity": "weight"}, "pruning.granulrity: unknown key; did you mean 'granularity'?"),
        ({"target": {"rato": 0.5}}, "pruning.target.rato: unknown key; did you mean 'ratio'?"),
        ({"target": 0.5, "schedule": {"step": 3}}, "pruning.schedule.step: unknown key; did you mean 'steps'?"),
        ({"target": 0.5, "recovery": {"epoch": 3}}, "pruning.recovery.epoch: unknown key; did you mean 'epochs'?"),
        ({}, "pruning.target: missing, e.g. {ratio: 0.8}"),
        ({"target": 1.0}, "pruning.target.ratio: input should be less than 1, not 1.0"),
        ({"target": -0.5}, "pruning.target.ratio: input should be greater than or equal to 0, not -0.5"),
        (
            {"target": 0.5, "scope": "gobal"},
            "pruning.scope: input should be 'global', 'layer' or 'isomorphic', not 'gobal'",
        ),
        (
            {"target": 0.5, "schedule": "geometrc"},
            "pruning.schedule.kind: unknown schedule 'geometrc'; did you mean 'geometric'?",
        ),
        (
            {"target": 0.5, "schedule": {"steps": 3}},
            "pruning.schedule.steps: one_shot has one step, not 3; use geometric or constant for several",
        ),
        (
            {"target": 0.5, "schedule": {"kind": "cubic", "largest_step": 0.1}},
            "pruning.schedule.largest_step: only for geometric and hybrid, not 'cubic'; use steps",
        ),
        (
            {"target": 0.5, "schedule": {"kind": "geometric", "largest_step": 0.1, "steps": 3}},
            "pruning.schedule.largest_step: give either steps or largest_step, not both",
        ),
        (
            {"target": 0.5, "schedule": {"kind": "cubic", "first": 0.1}},
            "pruning.schedule.first: only the hybrid schedule has a first step of its own, not 'cubic'",
        ),
        (
            {"target": 0.5, "schedule": {"kind": "hybrid", "first": 0.6}},
            "pruning.schedule.first: 0.6 must lie between 0 and the ratio 0.5, e.g. 0.375",
        ),
        (
            {"target": 0.5, "schedule": {"kind": "hybrid", "first": 0.6, "largest_step": 0.1}},
            "pruning.schedule.first: 0.6 must lie between 0 and the ratio 0.5, e.g. 0.375",
        ),
        (
            {"target": 0.5, "criterion": {"batches": 8}},
            "pruning.criterion: a map needs the key 'name', e.g. {name: taylor, batches: 8}",
        ),
        (
            {"target": 0.5, "granularity": "4:2"},
            "pruning.granularity: '4:2' must keep fewer than it groups, and at least one, e.g. 2:4",
        ),
        ({"target": 0.3, "granularity": "2:4"}, "pruning.target.ratio: 2:4 removes 0.5, not 0.3"),
        (
            {"granularity": "2:4", "per_layer": {"head": 0.1}},
            "pruning.per_layer: 2:4 gives every layer the same ratio; use ignore instead",
        ),
        (
            {"granularity": "2:4", "min_kept": 3},
            "pruning.min_kept: 2:4 fixes what every layer keeps; use ignore instead",
        ),
        ({"target": 0.5, "per_layer": {"head": 1.5}}, "pruning.per_layer.head: input should be less than 1, not 1.5"),
        ({"target": 0.5, "recovery": {"epochs": 1, "steps": 5}}, "pruning.recovery.steps: give either epochs or steps"),
        ({"target": 0.5, "recovery": {"patience": []}}, "pruning.recovery.patience: an empty list says nothing"),
        ({"target": 0.5, "recovery": {"patience": 0}}, "pruning.recovery.patience: input should be greater than"),
        ({"target": {"ratio": False}}, "pruning.target.ratio: input should be a valid number, not False"),
        ({"target": {"ratio": "0.5"}}, "pruning.target.ratio: input should be a valid number, not '0.5'; write 0.5,"),
        ({"target": 0.5, "schedule": {"kind": "cubic", "steps": "2"}}, "pruning.schedule.steps: input should be a val"),
        ({"target": 0.5, "schedule": {"kind": "cubic", "steps": 2.0}}, "pruning.schedule.steps: input should be a val"),
        (
            {"target": 0.5, "recovery": {"learning_rate": "1e-3"}},
            "pruning.recovery.learning_rate: input should be a valid number, not '1e-3'; write 0.001, without quotes",
        ),
        (
            {"target": 0.5, "recovery": {"restore_best": "no"}},
            "pruning.recovery.restore_best: input should be a valid boolean, not 'no'; write false, without quotes",
        ),
        (
            {"target": 0.5, "recovery": {"epochs": [3, "x"]}},
            "pruning.recovery.epochs.1: input should be a valid number, not 'x'",
        ),
        (
            {"target": 0.5, "recovery": {"epochs": float("inf")}},
            "pruning.recovery.epochs: input should be a finite number, not inf",
        ),
        ({"target": 0.5, "min_kept": True}, "pruning.min_kept: input should be a valid integer, not True"),
    ],
)
def test_refusals_are_one_line_that_names_the_key(values, message):
    line = refusal(**values)
    assert line.startswith(message)
    assert "\n" not in line


@pytest.mark.parametrize("value", [-1, 1.5, -0.5])
def test_min_kept_is_a_count_or_a_fraction(value):
    line = refusal(target=0.5, min_kept=value)
    assert line.startswith("pruning.min_kept: ")
    assert str(value) in line
    assert "\n" not in line


def test_min_kept_keeps_its_type():
    assert isinstance(PruningConfig(target=0.5, min_kept=1).min_kept, int)
    assert isinstance(PruningConfig(target=0.5, min_kept=1.0).min_kept, float)


def test_assignments_are_checked():
    config = PruningConfig(target=0.5)
    with pytest.raises(ValidationError):
        config.scope = "everything"


def test_schedule_targets():
    assert Schedule(kind="hybrid").targets(0.8) == hfprune.schedules.targets("hybrid", 0.8, 3)
    assert Schedule(kind="geometric").targets(0.8) == hfprune.schedules.targets("geometric", 0.8, 5)
    assert Schedule(kind="geometric", largest_step=0.1).targets(0.8) == hfprune.schedules.targets("geometric", 0.8, 16)
    assert Schedule(kind="hybrid", first=0.5, largest_step=0.05).targets(0.8) == hfprune.schedules.targets(
        "hybrid", 0.8, 7, first=0.5
    )
    assert Schedule(kind="constant", steps=3).targets(0) == [0.0]


def test_recovery_repeats_the_last_value():
    recovery = Recovery(epochs=[30, 2], patience=4)
    assert [recovery.value("epochs", step) for step in range(4)] == [30, 2, 2, 2]
    assert recovery.value("patience", 7) == 4
    assert recovery.value("learning_rate", 0) is None
