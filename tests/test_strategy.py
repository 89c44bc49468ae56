"""The ICE strategy's configuration: units, switches, golden learning rates."""

import pytest
import torch
from pydantic import ValidationError

import hfprune
from hfprune.config import PruningConfig
from hfprune.errors import ConfigError
from hfprune.recipe import Recipe, apply_override
from hfprune.strategy import Drop, Ice, Rate, pruning_aware_rate
from hfprune.strict import one_line
from tests.test_config import refusal

GOLDEN = {0.88: 0.00098, 0.86: 0.000835, 0.85: 0.00065, 0.84: 0.000465, 0.82: 0.00032, 0.75: 0.0003, 0.5: 0.0003}


@pytest.mark.parametrize(("remaining", "expected"), GOLDEN.items())
def test_golden_learning_rates(remaining, expected):
    found = pruning_aware_rate(remaining, base=0.001, delta=0.0007, p=0.15, beta=50)
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_rate_has_a_value_everywhere():
    for remaining in (0.0, 1e-9, 0.4, 0.79, 0.8, 0.81, 1.0):
        assert 0.0003 <= pruning_aware_rate(remaining, base=0.001, delta=0.0007, p=0.6, beta=50) <= 0.001
    assert pruning_aware_rate(1.0, base=0.001, delta=0.0007, p=0.6, beta=50) == 0.001


def test_the_rate_follows_the_phase_where_nothing_is_said():
    assert Rate().at(0.85, 0.01) == pytest.approx(0.01 - 0.007 / 2)
    assert Rate(base=0.002, delta=0.001).at(0.5, 0.01) == pytest.approx(0.001)


def test_a_drop_is_in_points_or_relative():
    assert Drop(points=1.5).of(0.93, in_points=True) == pytest.approx(0.015)
    assert Drop(points=1.5).of(93.0, in_points=True) == 1.5
    assert Drop(relative=0.05).of(20.0, in_points=False) == 1.0


def test_parts_are_switched():
    config = PruningConfig(target=0.5, strategy="ice")
    assert config.strategy == Ice() == Ice(trigger=1.5, freeze=0.5, rate={}, tune=False)
    assert config.strategy == Ice(trigger=True, freeze=True, rate=True)
    off = PruningConfig(target=0.5, strategy={"kind": "ice", "trigger": False, "freeze": False, "rate": False})
    assert (off.strategy.trigger, off.strategy.freeze, off.strategy.rate) == (False, False, False)
    assert Ice(tune=True).tune.trials == 5
    again = PruningConfig(**config.model_dump(mode="json"))
    assert again == config


def test_an_override_reaches_into_the_short_form():
    values = {"model": {"name": "x"}, "data": {"name": "digits"}, "output": {"folder": "y"}}
    values["pruning"] = {"target": 0.5, "strategy": "ice"}
    apply_override(values, "pruning.strategy.trigger=2")
    assert Recipe.parse(values).pruning.strategy == Ice(trigger=2)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"trigger": 0.015}, "pruning.strategy.trigger.points: 0.015 is no number of percentage points (write 1.5 for"),
        ({"trigger": 150}, "at most 100"),
        ({"trigger": {"relative": 5}}, "pruning.strategy.trigger.relative: 5 is no fraction; write 0.05 for 5 %"),
        ({"trigger": {"relative": 0.1, "points": 1}}, "give either points or relative"),
        ({"tune": {"bound": 0.01}}, "pruning.strategy.tune.bound.points: 0.01"),
        ({"freeze": 50}, "pruning.strategy.freeze: input should be less than 1, not 50"),
        ({"rate": {"base": 1e-3, "delta": 2e-3}}, "pruning.strategy.rate.delta: 0.002 would leave no learning rate"),
        ({"triger": 1}, "unknown key; did you mean 'trigger'?"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(values, said):
    line = refusal(target=0.5, strategy=values)
    assert said in line and "\n" not in line


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"schedule": {"kind": "constant", "steps": 3}}, "pruning.schedule: the strategy ice has one step a block"),
        (
            {"granularity": "layer"},
            "pruning.granularity: the strategy ice prunes inside blocks, which 'layer' does not",
        ),
        ({"granularity": "channel", "target": {"latency": 0.5}}, "pruning.target.latency: what one block takes"),
        ({"granularity": "channel", "per_layer": [0.5, 0.5]}, "pruning.per_layer: a list has no meaning"),
        ({"strategy": "ise"}, "pruning.strategy.kind: input should be 'ice', not 'ise'"),
    ],
)
def test_what_does_not_go_with_it_is_refused(values, said):
    assert said in refusal(**{"target": 0.5, "strategy": "ice"} | values)


def test_it_needs_a_trainer():
    model = torch.nn.Linear(4, 4)
    with pytest.raises(ConfigError, match="pruning.strategy: fine-tuning between steps needs PruningTrainer"):
        hfprune.prune(model, PruningConfig(target=0.5, strategy="ice"))
    assert (model.weight != 0).all()


def test_distillation_is_switched():
    recovery = PruningConfig(target=0.5, recovery={"distill": True}).recovery
    assert (recovery.distill.temperature, recovery.distill.alpha) == (2.0, 0.5)
    assert PruningConfig(target=0.5, recovery={"distill": False}).recovery.distill is None
    assert "pruning.recovery.distill.alpha: input should be less than or equal to 1" in refusal(
        target=0.5, recovery={"distill": {"alpha": 5}}
    )
    with pytest.raises(ValidationError) as error:
        PruningConfig(target=0.5, recovery={"distill": {"temprature": 3}})
    assert "did you mean 'temperature'" in one_line(error.value)
