"""ICE-Pruning: block by block, fine-tuned where it must be, layers frozen, the rate falling, settings searched for."""

from __future__ import annotations

import builtins
import gc
import json

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hfprune import PruningTrainer
from hfprune.errors import ConfigError
from hfprune.strategy import pruning_aware_rate
from hfprune.training.ice import course
from hfprune.training.ice.course import layer_parameters, least_changed
from hfprune.training.ice.tuning import sampled
from tests.support.processes import run_script
from tests.training.setup import Digits, PlainNet, make_trainer, tiny_vit
from tests.training.test_removal import Residual, parameters
from tests.training.test_resume import StopAt, assert_same, outcome

OFF = {"trigger": False, "freeze": False, "rate": False}


class Stage(nn.Module):
    """A residual block as ResNets have them: an activation after the sum, and where the width changes a convolution in
    the shortcut."""

    def __init__(self, before: int, width: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(before, width, 1) if before != width else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))) + self.shortcut(x))


class Resnet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.stages = nn.Sequential(Stage(8, 8), Stage(8, 16))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.stages(self.stem(x)).mean((2, 3)))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return Resnet()


def residual() -> nn.Module:
    torch.manual_seed(0)
    return Residual(depth=2)


def ice_trainer(folder, model, strategy="ice", callbacks=(), **more) -> PruningTrainer:
    pruning = {"granularity": "neuron", "target": 0.5, "round_to": 1, "schedule": "one_shot", "recovery": {}}
    pruning |= {"strategy": strategy} | more.pop("pruning", {})
    options = {"metric_for_best_model": "accuracy", "train_dataset": Digits(0, 64), "eval_dataset": Digits(1000, 1050)}
    return make_trainer(folder, model, pruning=pruning, callbacks=list(callbacks), **options | more)


class Watch(TrainerCallback):
    """The rate and what is trained in every phase, and what that changes."""

    def __init__(self):
        self.rates, self.trained, self.models = [], [], []

    def on_train_begin(self, args, state, control, model, optimizer, **_):
        self.rates.append(optimizer.param_groups[0]["lr"])
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.trained.append({name for name, p in model.named_parameters() if id(p) in held})
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def on_train_end(self, args, state, control, model, **_):
        self.models.append({n for n, p in model.named_parameters() if not torch.equal(p, self.before[n])})


CASES = {
    "resnet": (resnet, {"granularity": "channel"}, 2),
    "resnet by layers": (resnet, {"granularity": "channel", "scope": "layer"}, 2),
    "resnet, parameters": (resnet, {"granularity": "channel", "target": {"params": 0.5}}, 2),
    "vit": (tiny_vit, {"granularity": ["head", "neuron"], "target": {"macs": 0.7}}, 2),
    "own": (residual, {"granularity": "neuron"}, 2),
}


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_cut_one_after_another(tmp_path, name):
    build, pruning, blocks = CASES[name]
    model = build()
    trainer = ice_trainer(tmp_path, model, OFF, pruning={"recovery": {"steps": 1}} | pruning, save_strategy="no")
    sizes = []
    cut = trainer.method.prune_to
    trainer.method.prune_to = lambda target: (sizes.append(shapes(model)), cut(target))[1]
    trainer.train()
    sizes.append(shapes(model))
    assert len(trainer.steps) == blocks == len({step.block for step in trainer.steps})
    for step, before, after in zip(trainer.steps, sizes[:-1], sizes[1:], strict=True):
        inside = {name for name in before if before[name] != after[name] and name.startswith(f"{step.block}.")}
        later = [other.block for other in trainer.steps if other.phase > step.phase]
        assert inside
        if "channel" not in trainer.pruning.granularities:
            assert not any(before[n] != after[n] for n in before if n.startswith(tuple(f"{b}." for b in later)))
        assert step.achieved == pytest.approx(step.target, abs=0.04)  # of so few units one is much
    assert trainer.achieved == pytest.approx(trainer.pruning.ratio, abs=0.02)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_by_count_the_ratio_is_exact(tmp_path):
    trainer = ice_trainer(
        tmp_path, resnet(), OFF, pruning={"granularity": "channel", "target": 0.37}, save_strategy="no"
    )
    trainer.train()
    assert trainer.pruner.gone_units() == round(0.37 * trainer.pruner.total_units)


@pytest.mark.parametrize(
    ("granularity", "more"),
    [("weight", {}), ("weight", {"scope": "layer"}), ("2:4", {"target": None}), ("block:2x2", {})],
)
def test_blocks_are_masked_one_after_another(tmp_path, granularity, more):
    model = tiny_vit()
    trainer = ice_trainer(tmp_path, model, OFF, pruning={"granularity": granularity, "recovery": {"steps": 1}} | more)
    held = []
    cut = trainer.method.prune_to
    trainer.method.prune_to = lambda target: (cut(target), held.append(set(trainer.masks)))[0]
    trainer.train()
    first, second = (step.block for step in trainer.steps)
    assert not any(name.startswith(f"{second}.") for name in held[0])
    assert all(any(name.startswith(f"{block}.") for name in held[1]) for block in (first, second))
    assert trainer.steps[-1].achieved == pytest.approx(0.5, abs=1e-3)
    if granularity == "weight" and not more:
        assert trainer.masks.zeros == round(0.5 * trainer.masks.numel)


def test_a_step_is_fine_tuned_only_where_too_much_is_lost(tmp_path):
    watch = Watch()
    strategy = OFF | {"trigger": {"relative": 0.2}}
    trainer = ice_trainer(tmp_path, residual(), strategy, [watch])
    scripted(trainer, iter([0.9, 0.8, 0.7]))  # dense, then right after each pruning
    trainer.train()
    assert [step.fine_tuned for step in trainer.steps] == [False, True]
    assert [step.drop for step in trainer.steps] == pytest.approx([0.1, 0.2])
    assert [step.epochs for step in trainer.steps] == [0, 1]
    assert len(watch.rates) == 1
    report = trainer.course.report()
    assert (report["fine_tuned"], report["steps"], report["dense"]) == (1, 2, 0.9)


def scripted(trainer: PruningTrainer, values) -> None:
    """Evaluations say what they are told to, those of the fine-tuning itself the last of it."""
    measure, said = trainer.evaluate, {}

    def evaluate(*args, **options):
        metrics = measure(*args, **options)
        if not trainer.is_in_train:
            said["accuracy"] = next(values)
        return metrics | {"eval_accuracy": said["accuracy"]}

    trainer.evaluate = evaluate


def test_points_are_those_of_the_metric(tmp_path):
    trainer = ice_trainer(tmp_path, residual(), OFF | {"trigger": 10})
    scripted(trainer, iter([0.9, 0.79, 0.81]))
    trainer.train()
    assert [step.fine_tuned for step in trainer.steps] == [True, False]


def test_a_metric_that_shrinks(tmp_path):
    strategy = OFF | {"trigger": {"relative": 0.5}}
    trainer = ice_trainer(tmp_path, residual(), strategy, metric_for_best_model="loss")
    trainer.train()
    dense = trainer.course.found["dense"]
    for step in trainer.steps:
        assert step.drop == pytest.approx(step.metric_before["loss"] - dense)
        assert step.fine_tuned == (step.drop >= 0.5 * dense)


def test_the_learning_rate_follows_what_is_left(tmp_path):
    watch = Watch()
    strategy = OFF | {"rate": {"base": 0.002, "delta": 0.0014, "p": 0.2, "beta": 30}}
    model = residual()
    dense = parameters(model)
    sizes = []
    trainer = ice_trainer(tmp_path, model, strategy, [watch, Sizes(sizes)])
    trainer.train()
    expected = [pruning_aware_rate(size / dense, 0.002, 0.0014, 0.2, 30) for size in sizes]
    assert watch.rates == pytest.approx(expected, rel=1e-6)
    assert [step.learning_rate for step in trainer.steps] == pytest.approx(expected, rel=1e-6)
    assert watch.rates[0] > watch.rates[-1]


class Sizes(TrainerCallback):
    def __init__(self, sizes):
        self.sizes = sizes

    def on_train_begin(self, args, state, control, model, **_):
        self.sizes.append(parameters(model))


def test_what_the_probe_changed_least_is_frozen(tmp_path):
    watch, model = Watch(), residual()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = ice_trainer(tmp_path, model, OFF | {"freeze": 0.4}, [watch], pruning={"granularity": "weight"})
    trainer.course.begin(None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    changes = trainer.course.found["changes"]
    frozen = trainer.course.found["frozen"]
    assert len(frozen) == 3 and len(changes) == 6  # ceil(0.4 * 6)
    assert max(changes[name] for name in frozen) <= min(v for name, v in changes.items() if name not in frozen)
    trainer.train()
    held = {name for name, _ in model.named_parameters() if name.rpartition(".")[0] in frozen}
    assert all(not trained & held and trained | held == set(before) for trained in watch.trained)
    assert all(changed and not changed & held for changed in watch.models)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert trainer.steps[0].frozen == 3


def test_the_norm_that_follows_a_convolution_is_frozen_with_it():
    found = {}
    for layer, parameter in layer_parameters(model := resnet()):
        found.setdefault(layer, []).append(next(n for n, p in model.named_parameters() if p is parameter))
    first = "stages.0"
    assert found["stem"] == ["stem.weight", "stem.bias"]
    assert found[f"{first}.conv1"] == [f"{first}.{name}" for name in ("conv1.weight", "norm1.weight", "norm1.bias")]
    # A norm before its layer, as in transformers, belongs to nobody.
    tiny = tiny_vit()
    names = {id(parameter): name for name, parameter in tiny.named_parameters()}
    assert not any("norm" in names[id(parameter)] for _, parameter in layer_parameters(tiny))


def test_never_all_layers_are_frozen():
    assert least_changed({"a": 0.3, "b": 0.1, "c": 0.2}, 0.5) == ["b", "c"]
    assert least_changed({"a": 0.3, "b": 0.1, "c": 0.2}, 0.99) == ["b", "c"]
    assert least_changed({"a": 0.3}, 0.99) == []


RUNS = {
    "removal": (residual, {"granularity": "neuron"}),
    "masks": (tiny_vit, {"granularity": "weight"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, name):
    build, pruning = RUNS[name]

    def trainer(folder, *callbacks):
        made = ice_trainer(
            folder, build(), {"trigger": {"relative": 0.3}}, callbacks, save_strategy="steps", save_steps=1,
            pruning=pruning | {"recovery": {"steps": 4, "distill": True}},
        )  # fmt: skip
        scripted_by_step(made)
        return made

    whole = trainer(tmp_path / "whole")
    whole.train()
    tuned = [step.fine_tuned for step in whole.steps]
    assert True in tuned and False in tuned
    for step in (1, 3):
        folder = tmp_path / f"stopped-{step}"
        with pytest.raises(KeyboardInterrupt):
            trainer(folder, StopAt(step)).train()
        resumed = trainer(folder)
        resumed.train(resume_from_checkpoint=True)
        assert_same(outcome(resumed), outcome(whole))
        assert [step.fine_tuned for step in resumed.steps] == tuned
        assert resumed.course.found["frozen"] == whole.course.found["frozen"]
        assert json.loads(json.dumps(resumed.course.report()))["probe_seconds"] > 0


def scripted_by_step(trainer: PruningTrainer) -> None:
    """The first pruning costs little and the second much."""
    measure = trainer.evaluate

    def evaluate(*args, **options):
        metrics = measure(*args, **options)
        phase = trainer.progress.phase if trainer.progress.record else -1
        return metrics | {"eval_accuracy": {-1: 0.9, 0: 0.85, 1: 0.4}[phase]}

    trainer.evaluate = evaluate


def test_settings_are_searched_for_on_a_sample(tmp_path):
    model = residual()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    strategy = {"trigger": 20, "tune": {"trials": 3, "sample": 0.5, "bound": 40}}
    trainer = ice_trainer(tmp_path, model, strategy, save_strategy="no", train_dataset=Digits(0, 128))
    trainer.course.begin(None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    found = trainer.course.found
    trials = found["trials"]
    assert len(trials) == 3 and found["tuning_seconds"] > 0
    assert trials[0]["settings"]["trigger"]["points"] == 20  # as it is written
    within = [trial for trial in trials if trial["excess"] <= 0]
    best = min(within, key=lambda t: t["seconds"]) if within else min(trials, key=lambda t: t["drop"])
    assert found["settings"] == best["settings"] == trainer.course.now.model_dump(mode="json")
    trainer.train()
    assert trainer.course.report()["settings"]["tune"] is None


def test_one_probe_serves_the_search_and_the_run(tmp_path, monkeypatch):
    probes, probe = [], course.probe
    monkeypatch.setattr(course, "probe", lambda *args: (probes.append(probe(*args)), probes[-1])[1])
    strategy = {"trigger": 20, "freeze": 0.4, "tune": {"trials": 2, "sample": 0.5, "bound": 40}}
    trainer = ice_trainer(tmp_path, residual(), strategy, save_strategy="no")
    trainer.train()
    assert len(probes) == 1
    found = trainer.course.found
    assert found["changes"] == probes[0]
    assert found["frozen"] == least_changed(probes[0], trainer.course.now.freeze)
    assert not any("changes" in trial for trial in found["trials"])


def test_frozen_layers_that_come_first_take_no_backward_pass(tmp_path):
    model = resnet()
    trainer = ice_trainer(tmp_path, model, {"trigger": False}, pruning={"granularity": "channel"})
    trainer.course.found["frozen"] = ["stem", "stages.0.conv1", "stages.0.conv2"]
    reached = []
    model.stages[0].register_forward_hook(lambda module, inputs, output: reached.append(output.requires_grad))
    with trainer.course.fine_tuning():
        assert model(torch.randn(2, 1, 8, 8)).requires_grad
    model(torch.randn(2, 1, 8, 8))
    assert reached == [False, True]


def test_what_a_run_began_with_is_left_out_of_its_garbage_collections(tmp_path):
    counts = []

    class Count(TrainerCallback):
        def on_train_begin(self, *_, **__):
            counts.append(gc.get_freeze_count())

    trainer = ice_trainer(tmp_path, residual(), OFF, [Count()], save_strategy="no")
    trainer.train()
    assert len(counts) == 2 and min(counts) > 1000 and gc.get_freeze_count() == 0


def test_parts_that_are_off_are_not_searched_for(tmp_path):
    strategy = {"trigger": {"relative": 0.2}, "freeze": False, "rate": False, "tune": {"trials": 2, "sample": 0.5}}
    trainer = ice_trainer(tmp_path, residual(), strategy, save_strategy="no")
    trainer.course.begin(None)
    assert all(
        not trial["settings"]["freeze"] and not trial["settings"]["rate"] for trial in trainer.course.found["trials"]
    )


def test_a_sample_is_drawn_by_the_seed():
    rows = Digits(0, 100)
    some, share = sampled(rows, 0.1, 20, 3)
    assert len(some) == 20 and share == 0.2
    assert torch.equal(some[0]["pixel_values"], sampled(rows, 0.1, 20, 3)[0][0]["pixel_values"])
    assert len(sampled(rows, 0.1, 500, 3)[0]) == 100
    with pytest.raises(ConfigError, match="a stream has no length"):
        sampled(iter([]), 0.1, 1, 0)


def refusal(tmp_path, model=None, **options) -> str:
    with pytest.raises(ConfigError) as error:
        ice_trainer(tmp_path, model or residual(), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_input_is_one_line(tmp_path, monkeypatch):
    assert "pruning.strategy.trigger: needs an eval_dataset" in refusal(tmp_path, eval_dataset=None)
    tune = OFF | {"tune": {"bound": 1}}
    assert "pruning.strategy.tune.bound: needs an eval_dataset" in refusal(tmp_path, strategy=tune, eval_dataset=None)
    assert "pruning.strategy: ice fine-tunes and needs a train_dataset" in refusal(tmp_path, train_dataset=None)
    line = refusal(tmp_path, metric_for_best_model="loss")
    assert "'loss' is watched, which has no percentage points" in line and "trigger: {relative: 0.05}" in line
    line = refusal(tmp_path, PlainNet(), pruning={"granularity": "weight"})
    assert "goes from residual block to residual block, and PlainNet has none" in line
    importing = builtins.__import__

    def without_optuna(name, *args, **options):
        if name == "optuna":
            raise ImportError
        return importing(name, *args, **options)

    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    monkeypatch.setattr(builtins, "__import__", without_optuna)
    assert "needs the package optuna: pip install 'hfprune[tune]'" in refusal(tmp_path, strategy={"tune": True})


def test_without_evaluation_every_step_is_fine_tuned(tmp_path):
    trainer = ice_trainer(tmp_path, residual(), OFF | {"freeze": 0.3}, eval_dataset=None)
    trainer.train()
    assert [step.fine_tuned for step in trainer.steps] == [True] * 2
    assert trainer.steps[0].drop is None


SCRIPT = """
import sys
from pathlib import Path
import torch, torch.distributed as dist
from tests.training.test_ice import ice_trainer, residual

folder, processes = Path(sys.argv[1]), int(sys.argv[2])
strategy = {"trigger": {"relative": 0.1}, "tune": {"trials": 2, "sample": 0.5, "bound": {"relative": 0.2}}}
trainer = ice_trainer(folder, residual(), strategy, per_device_train_batch_size=32 // processes)
assert trainer.args.world_size == processes
trainer.train()
found = {key: trainer.course.found[key] for key in ("frozen", "settings")}
all_found = [None] * processes
dist.all_gather_object(all_found, (found, {n: v.clone() for n, v in trainer.model.state_dict().items()}))
assert all_found[0][0] == all_found[1][0]
assert all(torch.equal(value, all_found[1][1][name]) for name, value in all_found[0][1].items())
"""


def test_two_processes_decide_alike(tmp_path):
    run_script(tmp_path / "ice.py", SCRIPT, tmp_path / "run", 2, processes=2)
