"""prune(): what it reports, and that a failure leaves the model as it was."""

import pytest
import torch
from rich.console import Console

import hfprune
from hfprune import PruningConfig
from hfprune.criteria import criteria
from hfprune.errors import ConfigError, DataError, ModelError
from tests.support.models import CNN, MLP, TINY, images, same, snapshot, vectors

STEPS = {"kind": "constant", "steps": 3}


def test_the_report():
    report = hfprune.prune(CNN(), PruningConfig(target=0.5))
    console = Console(width=100)
    with console.capture() as capture:
        console.print(report.table())
    text = capture.get()
    assert "564 of 1,128 units pruned (50.00%)" in text
    assert all(name in text for name in ("conv1.weight", "conv2.weight", "head.weight", "864"))
    assert report.plan == {}


def test_the_masks_are_bound():
    model = MLP()
    report = hfprune.prune(model, PruningConfig(target=0.5))
    with torch.no_grad():
        model.first.weight.fill_(1)
    report.masks.enforce()
    assert int((model.first.weight == 0).sum()) == report.masks.sparsity()["first.weight"].zeros


def test_parameters_stay_the_same_objects():
    model = CNN()
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    hfprune.prune(model, PruningConfig(criterion="taylor", target=0.5, schedule=STEPS), images())
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("schedule", ["one_shot", STEPS])
def test_only_weights_change(schedule):
    model = CNN().train()
    before = snapshot(model)
    report = hfprune.prune(model, PruningConfig(criterion="taylor", target=0.5, schedule=schedule), images())
    after = snapshot(model)
    changed = {key for key in before if not same({"": before[key]}, {"": after[key]})}
    assert changed == set(report.masks)


def prepared(name):
    model = TINY[name].build().train()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
        if index % 3 == 0 and parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("schedule", ["one_shot", STEPS])
@pytest.mark.parametrize("name", ["mlp", "tied", "vit", "gpt2", "timm_resnet"])
def test_a_failure_in_the_data_changes_nothing(name, schedule):
    model, batch = prepared(name), TINY[name].batch()
    before = snapshot(model)
    config = PruningConfig(criterion="taylor", target=0.5, schedule=schedule)
    with pytest.raises(ConfigError, match="needs data"):
        hfprune.prune(model, config)
    with pytest.raises(DataError):
        hfprune.prune(model, config, [])
    with pytest.raises(ModelError, match="^pruning.criterion: 'taylor': the model can't take the batch: "):
        hfprune.prune(model, config, [batch, {"wrong": torch.ones(1)}])
    with pytest.raises(ModelError, match="the loss on calibration batch 1 is nan; nothing was pruned$"):
        hfprune.prune(model, config, batch, loss=lambda m, b: next(m.parameters()).sum() * torch.nan)
    with pytest.raises(ZeroDivisionError):
        hfprune.prune(model, config, batch, loss=lambda m, b: 1 / 0)
    assert same(before, snapshot(model))
    assert not hasattr(model, "hfprune")
    assert not hasattr(getattr(model, "config", None), "hfprune")


@pytest.mark.parametrize("granularity", ["weight", "block:2x2", "2:4"])
@pytest.mark.parametrize("fails_in", [1, 2, 3])
def test_a_failure_in_a_later_step_puts_the_weights_back(granularity, fails_in):
    steps = []

    @hfprune.register_criterion("breaking")
    def breaking(weight):
        steps.append(weight.shape)
        return weight.abs() / (torch.nan if len(steps) > 3 * (fails_in - 1) else 1)

    model = CNN()
    before = snapshot(model)
    try:
        with pytest.raises(ModelError, match="scores that are not finite"):
            hfprune.prune(
                model, PruningConfig(criterion="breaking", granularity=granularity, target=0.5, schedule=STEPS)
            )
    finally:
        criteria.unregister("breaking")
    assert len(steps) == 3 * (fails_in - 1) + 1
    assert same(before, snapshot(model))


@pytest.mark.parametrize("schedule", ["one_shot", STEPS])
def test_a_failure_in_the_record_puts_the_weights_back(schedule):
    class Broken(MLP):
        def state_dict(self, *args, **kwargs):
            raise OSError("no state")

    model = Broken()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(OSError, match="no state"):
        hfprune.prune(model, PruningConfig(target=0.5, schedule=schedule))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_weights_that_are_not_numbers():
    model = MLP()
    with torch.no_grad():
        model.first.weight[0, 0] = torch.nan
    before = snapshot(model)
    with pytest.raises(ModelError, match="not a number in 'first.weight'$"):
        hfprune.prune(model, PruningConfig(target=0.5))
    assert same(before, snapshot(model))


def test_pruning_inside_training_needs_the_trainer():
    with pytest.raises(
        ConfigError, match="^pruning.schedule.every: pruning inside a training run needs PruningTrainer"
    ):
        hfprune.prune(MLP(), PruningConfig(target=0.5, schedule={"kind": "cubic", "every": 5}))


def test_pruning_again_goes_on():
    model = MLP()
    first = hfprune.prune(model, PruningConfig(target=0.4)).masks
    second = hfprune.prune(model, PruningConfig(target=0.7)).masks
    assert all(bool((first.kept[name] | ~second.kept[name]).all()) for name in first)
    assert second.zeros == round(0.7 * 144)


def test_nothing_goes_at_ratio_zero():
    model = CNN()
    before = snapshot(model)
    report = hfprune.prune(model, PruningConfig(target=0), images())
    assert same(before, snapshot(model))
    assert (report.pruned, report.achieved) == (0, 0.0)


def test_in_evaluation_or_training_the_choice_is_the_same():
    model = MLP()
    other = MLP().eval()
    other.load_state_dict(model.state_dict())
    config = PruningConfig(criterion="taylor", target=0.5)
    digests = [hfprune.prune(m, config, vectors()).masks.digest() for m in (model.train(), other)]
    assert digests[0] == digests[1]
