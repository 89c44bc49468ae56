"""PruningTrainer with removal: smaller between phases, nothing dead in the optimizer, resumable in any phase."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification, TrainerCallback

import hfprune
from hfprune.checkpoint.metadata import block_of, plan_of
from hfprune.errors import CheckpointError, ConfigError, ModelError
from hfprune.training.checkpoints.folder import last_checkpoint
from hfprune.training.optimizer import check_live
from tests.training.setup import PlainNet, make_trainer, tiny_vit
from tests.training.test_resume import StopAt, assert_same, outcome

HEADS = {"granularity": ["head", "neuron"], "target": {"macs": 0.5}, "round_to": 1}
CHANNELS = {"granularity": "channel", "target": 0.5, "round_to": 1}
LAYERS = {"granularity": ["layer", "neuron"], "target": {"params": 0.5}, "round_to": 1}


class Residual(nn.Module):
    """An own module with blocks that can be dropped."""

    def __init__(self, depth: int = 4):
        super().__init__()
        self.stem = nn.Linear(64, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(x.flatten(1))
        for block in self.blocks:
            hidden = block(hidden)
        return self.fc(hidden)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return PlainNet()


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class Fixed(Residual):
    """The blocks look as if they could be dropped, but the code counts on all of them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third, fourth = self.blocks
        return self.fc(fourth(third(second(first(self.stem(x.flatten(1)))))))


class Watch(TrainerCallback):
    """What the optimizer holds at the beginning of every phase."""

    def __init__(self):
        self.sizes: list[int] = []

    def on_train_begin(self, args, state, control, model, optimizer, **_):
        check_live(model, optimizer, all_of_them=True)
        self.sizes.append(sum(p.numel() for group in optimizer.param_groups for p in group["params"]))


@pytest.mark.parametrize(("build", "pruning"), [(tiny_vit, HEADS), (plain, CHANNELS)], ids=["vit", "own"])
def test_the_model_gets_smaller_before_each_phase(tmp_path, build, pruning):
    watch, model = Watch(), build()
    dense = parameters(model)
    trainer = make_trainer(tmp_path, model, pruning=pruning, callbacks=[watch])
    trainer.train()
    assert dense > watch.sizes[0] > watch.sizes[1] == parameters(trainer.model)
    assert trainer.model is model
    assert [step.target for step in trainer.steps] == pytest.approx([0.25, 0.5])
    assert [step.params for step in trainer.steps] == watch.sizes
    assert trainer.achieved == pytest.approx(0.5, abs=0.03)
    assert all(step.metric_before and step.metric for step in trainer.steps)


def test_targets_count_from_the_dense_model(tmp_path):
    model = tiny_vit()
    dense = hfprune.measure(model, batch_sizes=()).macs
    make_trainer(tmp_path, model, pruning=HEADS).train()
    assert hfprune.measure(model, batch_sizes=()).macs == pytest.approx(0.5 * dense, rel=0.03)


@pytest.mark.parametrize("criterion", ["taylor", "movement", "random"])
def test_criteria_score_what_is_left(tmp_path, criterion):
    trainer = make_trainer(tmp_path, plain(), pruning=CHANNELS | {"criterion": criterion, "recovery": {"steps": 3}})
    trainer.train()
    assert trainer.model.conv.out_channels == trainer.model.norm.num_features == 8


def test_what_was_saved_loads_again(tmp_path):
    trainer = make_trainer(tmp_path / "run", pruning=HEADS | {"recovery": {"steps": 2}})
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    pixels = torch.randn(2, 1, 8, 8)
    trainer.model.eval()
    for loaded in (
        hfprune.from_pretrained(tmp_path / "saved"),
        AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval(),
    ):
        assert torch.equal(loaded(pixels).logits, trainer.model(pixels).logits)


def test_masks_of_a_sparse_model_survive(tmp_path):
    model = plain()
    hfprune.prune(model, hfprune.PruningConfig(target=0.5))
    zeros = {name for name in block_of(model)["sparsity"]}
    trainer = make_trainer(tmp_path, model, pruning=CHANNELS)
    trainer.train()
    held = dict(trainer.model.named_parameters())
    assert set(trainer.masks) == zeros and trainer.masks.zeros
    for name, kept in trainer.masks.kept.items():
        assert kept.shape == held[name].shape and bool((held[name][~kept] == 0).all())


def test_a_smaller_model_is_pruned_further(tmp_path):
    make_trainer(tmp_path / "one", pruning=HEADS | {"schedule": "one_shot"}).save_model(str(tmp_path / "dense"))
    first = make_trainer(tmp_path / "one", pruning=HEADS | {"target": {"macs": 0.7}, "recovery": {"steps": 2}})
    first.train()
    first.save_model(str(tmp_path / "first"))
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "first")
    second = make_trainer(tmp_path / "two", model, pruning=HEADS | {"target": {"macs": 0.8}, "recovery": {"steps": 2}})
    second.train()
    second.save_model(str(tmp_path / "second"))
    loaded = hfprune.from_pretrained(tmp_path / "second")
    assert parameters(loaded) < parameters(hfprune.from_pretrained(tmp_path / "first"))
    pixels = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded(pixels).logits, second.model.eval()(pixels).logits)


def test_an_optimizer_of_ones_own_follows(tmp_path):
    model = plain()
    norms, rest = list(model.norm.parameters()), [*model.conv.parameters(), *model.fc.parameters()]
    optimizer = torch.optim.SGD([{"params": norms, "lr": 0.01}, {"params": rest}], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5)
    watch = Watch()
    trainer = make_trainer(tmp_path, model, pruning=CHANNELS, optimizers=(optimizer, scheduler), callbacks=[watch])
    trainer.train()
    assert watch.sizes[1] == parameters(model)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.norm.parameters()}
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    assert all(p in optimizer.state for p in model.parameters())


def test_a_strangers_optimizer_is_refused_before_training(tmp_path):
    optimizer = torch.optim.SGD(plain().parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="optimizers: the optimizer holds a parameter that is not the model's"):
        make_trainer(tmp_path, plain(), pruning=CHANNELS, optimizers=(optimizer, None))


def test_dead_and_missing_parameters_are_found():
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.fc.bias = nn.Parameter(torch.zeros(10))
    with pytest.raises(ModelError, match="holds 1 parameters that the model does not have"):
        check_live(model, optimizer, all_of_them=True)
    with pytest.raises(ModelError, match="misses 1 parameters of the model, the first 'fc.bias'"):
        check_live(model, torch.optim.SGD([model.conv.weight, model.conv.bias, *model.norm.parameters(),
                                           model.fc.weight], lr=0.1), all_of_them=True)  # fmt: skip


@pytest.mark.parametrize(
    ("pruning", "error", "message"),
    [
        (HEADS | {"target": {"macs": 0.01}}, ConfigError, "pruning.target.macs: 1.00% of the dense model can't be"),
        (HEADS | {"target": {"macs": "9G"}}, ConfigError, "pruning.target.macs: the dense model has"),
        (HEADS | {"target": 0.999}, ConfigError, "pruning.target.ratio: 0.999 would empty a layer"),
        ({"granularity": "channel", "target": 0.5, "include": ["nothing*"]}, ConfigError, "pruning.include"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(tmp_path, pruning, error, message):
    model = tiny_vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message) as caught:
        make_trainer(tmp_path, model, pruning=pruning)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Loops(nn.Module):
    """Takes a decision by its data, which torch.export refuses."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        if x.sum() > 0:
            x = x + 1
        return self.fc(x)


def test_a_model_that_has_no_graph_is_refused_and_masks_still_work(tmp_path):
    with pytest.raises(ModelError) as caught:
        make_trainer(tmp_path, Loops(), pruning=CHANNELS)
    assert "test_removal.py" in str(caught.value) and "mask" in str(caught.value)
    make_trainer(tmp_path, Loops(), pruning={"target": 0.5, "recovery": {"steps": 1}}).train()


# ---- resumption -----------------------------------------------------------------------------------------------------

RUNS = {
    "heads": (tiny_vit, HEADS | {"recovery": {"epochs": 2, "patience": 1}}),
    "taylor channels": (plain, CHANNELS | {"criterion": "taylor"}),
    "layers": (Residual, LAYERS),
    "blocks that don't go": (Fixed, LAYERS),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return RUNS[name][0]()


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, name):
    options = {"pruning": RUNS[name][1], "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "whole", build(name), **options)
    whole.train()
    expected, length = outcome(whole), whole.state.global_step
    assert plan_of(whole.model) is not None
    assert whole.steps[-1].params == parameters(whole.model)
    assert whole.achieved == pytest.approx(0.5, abs=0.03)
    for step in (4, 8, length - 1):
        folder = tmp_path / f"stopped-{step}"
        with pytest.raises(KeyboardInterrupt):
            make_trainer(folder, build(name), **options, callbacks=[StopAt(step)]).train()
        resumed = make_trainer(folder, build(name), **options)
        resumed.train(resume_from_checkpoint=True)
        assert_same(outcome(resumed), expected)
        assert [s.params for s in resumed.steps] == [s.params for s in whole.steps]
    again = make_trainer(tmp_path / "whole", build(name), **options)
    again.train(resume_from_checkpoint=True)  # ended: taken up without training
    assert_same(outcome(again), expected)


def test_a_timed_target_means_the_same_after_an_interruption(tmp_path):
    options = {"pruning": CHANNELS | {"target": {"latency": 0.9}}}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, plain(), **options, callbacks=[StopAt(6)]).train()
    state = json.loads((last_checkpoint(tmp_path) / "pruning_state.json").read_text())
    resumed = make_trainer(tmp_path, plain(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.pruner.dense.latency == state["structure"]["dense"]["latency"] > 0


def test_a_model_that_is_smaller_already_is_not_cut_twice(tmp_path):
    trainer = make_trainer(tmp_path, plain(), pruning=CHANNELS)
    trainer.train()
    first = sorted(Path(tmp_path).glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)[0]
    with pytest.raises(CheckpointError, match="the trainer's model is smaller already"):
        trainer.train(resume_from_checkpoint=str(first))


def test_a_checkpoint_of_masks_is_none_of_a_removal(tmp_path):
    make_trainer(tmp_path, plain(), pruning={"target": 0.5}).train()
    with pytest.raises(CheckpointError, match=r"pruning\.(granularity|round_to|target)"):
        make_trainer(tmp_path, plain(), pruning=CHANNELS).train(resume_from_checkpoint=True)
