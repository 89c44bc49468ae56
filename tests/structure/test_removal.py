"""What a removal owes to the model: an equal result, or an untouched model."""

import copy

import pytest
import torch
from torch import nn

import hfprune
from hfprune import PruningConfig
from hfprune.errors import ConfigError, ModelError
from hfprune.structure import removal, surgery
from hfprune.structure.groups import analyse
from tests.support.structures import spread

INPUTS = (torch.zeros(2, 3, 6, 6),)


class Small(nn.Module):
    """A residual stream, an inner convolution with BatchNorm, and two layers that share a weight."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.up, self.norm, self.down = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.Conv2d(12, 8, 1)
        self.left, self.right = nn.Linear(8, 6), nn.Linear(8, 6)
        self.right.weight = self.left.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        x = (x + self.down(self.norm(self.up(x)).relu())).mean((2, 3))
        return self.head(self.left(x).relu() + self.right(x).relu())


@pytest.fixture
def small():
    return spread(Small())


@pytest.fixture
def inputs():
    return (torch.randn(2, 3, 6, 6),)


def config(**options):
    return PruningConfig(**{"granularity": "channel", "target": 0.5, "scope": "layer", "round_to": 1} | options)


def state_of(model):
    """Everything that a removal may change: tensors with their identities, gradients and modes, attributes, order."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    identities = {name: id(tensor) for name, tensor in tensors}
    values = {name: tensor.detach().clone() for name, tensor in tensors}
    attributes = {
        path: {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | tuple | list)}
        for path, module in model.named_modules()
    }
    return identities, values, copy.deepcopy(attributes), {p: id(m) for p, m in model.named_modules()}


def assert_untouched(model, before):
    now = state_of(model)
    assert now[0] == before[0] and now[2] == before[2] and now[3] == before[3]
    for name, value in before[1].items():
        assert torch.equal(now[1][name], value), name


def test_gradients_and_requires_grad_go_along(small, inputs):
    small.up.weight.requires_grad_(False)
    small(*inputs).sum().backward()
    weights = {name: parameter.detach().clone() for name, parameter in small.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in small.named_parameters() if p.grad is not None}
    hfprune.prune(small, config(), example_inputs=inputs)
    assert not small.up.weight.requires_grad
    assert all(p.requires_grad for name, p in small.named_parameters() if name != "up.weight")
    for name, parameter in small.named_parameters():
        if name not in gradients:
            assert parameter.grad is None
            continue
        # Every value still has the gradient that it had: the pairs of both are found among the dense ones.
        assert parameter.grad.shape == parameter.shape
        dense = set(zip(weights[name].flatten().tolist(), gradients[name].flatten().tolist(), strict=True))
        assert set(zip(parameter.flatten().tolist(), parameter.grad.flatten().tolist(), strict=True)) <= dense, name


def test_tied_weights_stay_tied_and_are_counted_once(small, inputs):
    report = hfprune.prune(small, config(target={"params": 0.5}), example_inputs=inputs)
    assert small.left.weight is small.right.weight
    dense = sum(p.numel() for p in Small().parameters())
    assert 1 - sum(p.numel() for p in small.parameters()) / dense == pytest.approx(report.achieved, abs=1e-9)


def test_the_model_trains_on(small, inputs):
    hfprune.prune(small, config(), example_inputs=inputs)
    small.train()
    optimizer = torch.optim.AdamW(small.parameters(), lr=0.01)
    before = small(*inputs).square().mean()
    for _ in range(5):
        optimizer.zero_grad()
        small(*inputs).square().mean().backward()
        optimizer.step()
    assert small(*inputs).square().mean() < before
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": {"macs": 0.0001}}, "can't be reached"),
        ({"target": {"params": 1e9}}, "less than that already"),
        ({"granularity": "head"}, "granularity"),
        ({"ignore": ["nothing.*"]}, "ignore"),
        ({"per_layer": [0.5]}, "per_layer"),
        ({"min_kept": 1.0, "scope": "global"}, "min_kept"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_can_t_be_done_is_refused_before_anything_changes(small, inputs, options, message):
    before = state_of(small)
    with pytest.raises(ConfigError, match=message):
        hfprune.prune(small, config(**options), example_inputs=inputs)
    assert_untouched(small, before)


@pytest.mark.parametrize("wrong", ["shifted", "one tensor", "nothing"])
def test_a_wrong_cut_does_not_pass_the_proof(monkeypatch, small, inputs, wrong):
    def kept_indices(structure, gone):
        kept = surgery.kept_indices(structure, gone)
        if wrong == "shifted":  # the same number of channels, but not those that were scored
            sizes = {name: tensor.shape for name, tensor in structure.model.state_dict().items()}
            return {n: {d: (k + 1) % sizes[n][d] for d, k in dims.items()} for n, dims in kept.items()}
        if wrong == "one tensor":  # the channels of one weight in another order than everywhere else
            return kept | {"down.weight": {d: k.flip(0) for d, k in kept["down.weight"].items()}}
        return {}

    before = state_of(small)
    monkeypatch.setattr(removal, "kept_indices", kept_indices)
    with pytest.raises(ModelError, match="differs|shape|size|nothing|can't be"):
        hfprune.prune(small, config(), example_inputs=inputs)
    assert_untouched(small, before)


def test_a_removal_is_taken_back_to_the_last_bit(small, inputs):
    structure = analyse(small, inputs)
    before, wanted = state_of(small), small(*inputs)
    halves = {name: torch.arange(0, group.units, 2) for name, group in structure.groups.items()}
    done = removal.remove(structure, halves)
    assert done.difference < 1e-5
    assert small.up.weight.shape[0] == 6
    done.journal.rollback()
    assert_untouched(small, before)
    assert torch.equal(small(*inputs), wanted)


def test_a_loss_that_fails_leaves_the_model_as_it_was(small, inputs):
    def loss(model, batch):
        raise ZeroDivisionError("in the user's loss")

    before = state_of(small)
    with pytest.raises(ZeroDivisionError):
        hfprune.prune(small, config(criterion="taylor"), data=inputs[0], loss=loss, example_inputs=inputs)
    assert_untouched(small, before)


def test_a_schedule_that_fails_late_is_taken_back_whole(monkeypatch, small, inputs):
    steps = []

    def remove(structure, units):
        steps.append(units)
        if len(steps) > 2:
            raise ModelError("the third time")
        return removal.remove(structure, units)

    before = state_of(small)
    monkeypatch.setattr("hfprune.structure.pruner.remove", remove)
    monkeypatch.setattr("hfprune.structure.pruner.without_impossible", lambda structure: structure)
    with pytest.raises(ModelError, match="the third time"):
        hfprune.prune(small, config(schedule={"kind": "constant", "steps": 4}), example_inputs=inputs)
    assert len(steps) > 2
    assert_untouched(small, before)


class Counted(nn.Module):
    """Code that counts on a width which no attribute tells, beside a layer that can be cut."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 8), nn.Linear(2, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x).reshape(-1, 4, 2)
        return self.last(self.second(x).relu()).mean(1)


def test_code_with_fixed_numbers_is_protected_and_the_rest_is_cut():
    model, inputs = spread(Counted()), (torch.randn(2, 5),)
    report = hfprune.prune(model, config(), example_inputs=inputs)
    assert model.first.weight.shape == (8, 5)
    assert model.second.weight.shape == (4, 2)
    assert report.pruned == 4
