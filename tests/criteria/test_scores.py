"""Criteria against plain loops in double precision."""

import math

import pytest
import torch
from torch import nn

from hfprune import PruningConfig
from hfprune.criteria import create
from hfprune.criteria.calibration import gather, mean_gradients
from hfprune.errors import ConfigError
from hfprune.pruner import Pruner
from hfprune.units import block_sums
from hfprune.weights import prunable_weights
from tests.support.models import CNN, MLP, images, vectors


def close(scores, expected, floor=1e-12):
    """Relative error below 1e-5; what is `floor` times smaller than the largest is measured by that."""
    scores, expected = scores.double().flatten(), torch.tensor(expected, dtype=torch.float64)
    assert scores.shape == expected.shape
    scale = expected.abs().clamp(min=float(expected.abs().max()) * floor + 1e-300)
    assert float(((scores - expected).abs() / scale).max()) < 1e-5


def batches(model, count=3):
    make = images if isinstance(model, CNN) else vectors
    dtype = next(model.parameters()).dtype
    return [(inputs.to(dtype), labels) for inputs, labels in (make(4, seed=seed) for seed in range(count))]


def reference_gradients(model, data):
    """Gradients by central differences would be too coarse; a copy in double precision gives them by autograd."""
    double = type(model)().double().eval()
    double.load_state_dict({name: value.double() for name, value in model.state_dict().items() if value is not None})
    sums = {name: torch.zeros_like(p) for name, p in double.named_parameters()}
    for inputs, labels in data:
        double.zero_grad()
        nn.functional.cross_entropy(double(inputs.double()), labels).backward()
        for name, parameter in double.named_parameters():
            sums[name] += parameter.grad
    return {name: total / len(data) for name, total in sums.items()}


def lamp(values):
    squares = [value * value for value in values]
    found = []
    for value, square in zip(values, squares, strict=True):
        below = math.fsum(s for other, s in zip(values, squares, strict=True) if abs(other) >= abs(value))
        found.append(square / below if square else 0.0)
    return found


WEIGHT = {
    "l1": lambda w, g: [abs(a) for a in w],
    "l2": lambda w, g: [abs(a) for a in w],
    "lamp": lambda w, g: lamp(w),
    "taylor": lambda w, g: [(a * b) ** 2 for a, b in zip(w, g, strict=True)],
    "snip": lambda w, g: [abs(a * b) for a, b in zip(w, g, strict=True)],
    "movement": lambda w, g: [-a * b for a, b in zip(w, g, strict=True)],
    "taylor absolute": lambda w, g: [abs(a * b) for a, b in zip(w, g, strict=True)],
}
BLOCK = {
    "l1": lambda w, g, f: f * math.fsum(abs(a) for a in w),
    "l2": lambda w, g, f: math.sqrt(f * math.fsum(a * a for a in w)),
    "taylor": lambda w, g, f: (f * math.fsum(a * b for a, b in zip(w, g, strict=True))) ** 2,
    "snip": lambda w, g, f: f * math.fsum(abs(a * b) for a, b in zip(w, g, strict=True)),
    "movement": lambda w, g, f: -f * math.fsum(a * b for a, b in zip(w, g, strict=True)),
    "taylor absolute": lambda w, g, f: f * math.fsum(abs(a * b) for a, b in zip(w, g, strict=True)),
}


def named(name):
    return {"name": "taylor", "absolute": True} if name == "taylor absolute" else name


def config(name, granularity="weight"):
    return PruningConfig(criterion=named(name), granularity=granularity, target=0.5)


def unit_scores(model, name, granularity, data):
    pruner = Pruner(model, config(name, granularity))
    statistics = gather(pruner.criterion, model, pruner.weights, data)
    found = {}
    for key, weight in pruner.weights.items():
        terms = pruner.criterion.terms(key, weight.parameter.detach(), *statistics[key])
        if granularity != "weight":
            terms = block_sums(weight, terms, pruner.shape)
        found[key] = pruner.criterion.finish(terms)
    return found


def of_precision(model, name):
    """In single precision the gradients themselves carry more error than the formulas are allowed."""
    return model if name in ("l1", "l2", "lamp") else model.double()


@pytest.mark.parametrize("build", [MLP, CNN])
@pytest.mark.parametrize("name", WEIGHT)
def test_weights(build, name):
    model = of_precision(build(), name)
    data = batches(model)
    gradients = reference_gradients(model, data)
    for key, scores in unit_scores(model, name, "weight", data).items():
        weight = model.get_parameter(key).detach().double().flatten().tolist()
        close(scores, WEIGHT[name](weight, gradients[key].flatten().tolist()))


@pytest.mark.parametrize("build", [MLP, CNN])
@pytest.mark.parametrize("name", BLOCK)
def test_blocks_with_edges(build, name):
    model = of_precision(build(), name)
    data = batches(model)
    gradients = reference_gradients(model, data)
    for key, scores in unit_scores(model, name, "block:5x4", data).items():
        weight = model.get_parameter(key).detach().double().flatten(1)
        gradient = gradients[key].flatten(1)
        expected = []
        for top in range(0, weight.shape[0], 5):
            for left in range(0, weight.shape[1], 4):
                part = weight[top : top + 5, left : left + 4].flatten().tolist()
                slopes = gradient[top : top + 5, left : left + 4].flatten().tolist()
                expected.append(BLOCK[name](part, slopes, 20 / len(part)))
        close(scores, expected)


def scored(name, weight):
    criterion = create(name)
    return criterion.finish(criterion.terms("w", weight))


def test_lamp_with_ties_and_zeros():
    weight = torch.tensor([[0.5, -0.5, 0.0, -0.0], [1.0, 0.25, -1.0, 0.5]])
    scores = scored("lamp", weight)
    close(scores, lamp(weight.double().flatten().tolist()))
    assert scores.flatten()[0] == scores.flatten()[1] == scores.flatten()[7]
    assert scores.flatten()[2] == scores.flatten()[3] == 0
    assert not scored("lamp", torch.zeros(3)).any()


def test_lamp_gives_the_largest_one():
    assert float(scored("lamp", torch.randn(50, 3) * 1e-3).max()) == pytest.approx(1.0)


def test_random_is_uniform_and_its_own_for_every_layer_and_seed():
    criterion = create("random", seed=3)
    scores = criterion.terms("a", torch.zeros(40_000))
    assert torch.equal(scores, create("random", seed=3).terms("a", torch.zeros(40_000)))
    assert not torch.equal(scores, criterion.terms("b", torch.zeros(40_000)))
    assert not torch.equal(scores, create("random", seed=4).terms("a", torch.zeros(40_000)))
    assert float(scores.min()) >= 0
    assert float(scores.max()) < 1
    assert float(scores.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(scores.var()) == pytest.approx(1 / 12, abs=0.005)
    assert torch.histc(scores, 10, 0, 1).tolist() == pytest.approx([4000] * 10, rel=0.06)


@pytest.mark.parametrize("seed", [0, -1, 2**31, 2**32 + 5, 2**63])
def test_random_takes_any_seed(seed):
    scores = create("random", seed=seed).terms("a", torch.zeros(100))
    assert torch.equal(scores, create("random", seed=seed).terms("a", torch.zeros(100)))
    assert not torch.equal(scores, create("random", seed=seed + 1).terms("a", torch.zeros(100)))


def test_random_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    create("random").terms("a", torch.zeros(100))
    assert torch.equal(state, torch.get_rng_state())


def test_movement_takes_the_sums_of_training_where_there_are_any():
    model = MLP()
    weights = prunable_weights(model)
    history = {name: torch.randn(weight.parameter.shape) for name, weight in weights.items()}
    found = gather(create("movement"), model, weights, history=history)
    assert all(found[name][0] is history[name] for name in weights)


def test_gradients_are_averaged_over_all_batches():
    model = MLP()
    data = batches(model, 5)
    weights = prunable_weights(model)
    found = mean_gradients(model, weights, data, 8, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))
    expected = reference_gradients(model, data)
    for name in weights:
        close(found[name], expected[name].flatten().tolist(), floor=0.1)


def test_no_more_batches_than_asked_for():
    model = MLP()
    asked = []

    def endless():
        for seed in range(100):
            asked.append(seed)
            yield vectors(4, seed=seed)

    criterion = create("taylor", {"batches": 3})
    found = gather(criterion, model, prunable_weights(model), endless())
    expected = reference_gradients(model, [vectors(4, seed=seed) for seed in range(3)])
    close(found["first.weight"][0], expected["first.weight"].flatten().tolist(), floor=0.1)
    assert asked == [0, 1, 2]


def test_half_precision_gradients_are_summed_in_single():
    model = MLP().bfloat16()
    data = [(inputs.bfloat16(), labels) for inputs, labels in batches(model)]
    found = gather(create("taylor"), model, prunable_weights(model), data)
    assert {value.dtype for (value,) in found.values()} == {torch.float32}


@pytest.mark.parametrize("value", [0, -1, 2.5, "8", True])
def test_batches_must_be_a_count(value):
    with pytest.raises(ConfigError, match=r"^pruning.criterion.batches: .* must be a whole number, at least 1$"):
        create("taylor", {"batches": value})


def test_unknown_names_and_parameters():
    with pytest.raises(ConfigError, match="^pruning.criterion: unknown criterion 'tailor'; did you mean 'taylor'\\?$"):
        create("tailor")
    with pytest.raises(
        ConfigError,
        match=r"^pruning.criterion.absolut: 'taylor' takes no such parameter; did you mean 'absolute'\?$",
    ):
        create("taylor", {"absolut": True})
    with pytest.raises(ConfigError, match="^pruning.criterion.seed: 'random' takes no such parameter"):
        create("random", {"seed": 3})
