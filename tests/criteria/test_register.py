"""Criteria of one's own."""

import pytest
import torch

import hfprune
from hfprune import PruningConfig
from hfprune.criteria import Criterion, create, criteria
from hfprune.errors import ConfigError
from tests.support.models import MLP, vectors


@pytest.fixture
def register():
    before = set(criteria)
    yield hfprune.register_criterion
    for name in set(criteria) - before:
        criteria.unregister(name)


def test_a_function_of_the_weight(register):
    @register("largest")
    def largest(weight):
        return -weight.abs()

    model = MLP()
    before = torch.cat([model.first.weight.detach().flatten(), model.last.weight.detach().flatten()]).abs()
    hfprune.prune(model, PruningConfig(criterion="largest", target=0.5))
    after = torch.cat([model.first.weight.detach().flatten(), model.last.weight.detach().flatten()])
    assert bool(before[after == 0].min() >= before[after != 0].max())
    assert int((after == 0).sum()) == 72
    assert torch.equal(largest(torch.ones(1)), -torch.ones(1))


def test_a_function_with_the_gradient_equals_snip(register):
    @register("mine")
    def mine(weight, gradient):
        return (weight * gradient).abs()

    assert create("mine").statistics == ("gradient",)
    first, second = MLP(), MLP()
    second.load_state_dict(first.state_dict())
    one = hfprune.prune(first, PruningConfig(criterion="mine", target=0.4), vectors())
    two = hfprune.prune(second, PruningConfig(criterion="snip", target=0.4), vectors())
    assert one.masks.digest() == two.masks.digest()
    with pytest.raises(ConfigError, match="^pruning.criterion: 'mine' scores by gradients and needs data"):
        hfprune.prune(MLP(), PruningConfig(criterion="mine", target=0.4))


def test_statistics_in_any_order(register):
    @register("both")
    def both(movement, weight, gradient):
        assert torch.allclose(movement, weight * gradient)
        return movement - gradient

    hfprune.prune(MLP(), PruningConfig(criterion="both", target=0.4), vectors())


def test_parameters_with_defaults(register):
    seen = []

    @register("powered")
    def powered(weight, power=1.0, shift=0):
        seen.append((power, shift))
        return weight.abs() ** power + shift

    hfprune.prune(MLP(), PruningConfig(criterion="powered", target=0.4))
    hfprune.prune(MLP(), PruningConfig(criterion={"name": "powered", "power": 3.0}, target=0.4))
    assert set(seen) == {(1.0, 0), (3.0, 0)}
    with pytest.raises(
        ConfigError, match=r"^pruning.criterion.powr: 'powered' takes no such parameter; did you mean 'power'\?$"
    ):
        hfprune.prune(MLP(), PruningConfig(criterion={"name": "powered", "powr": 3.0}, target=0.4))


def test_a_function_works_for_every_granularity(register):
    register("plain")(lambda weight: weight.abs())
    for granularity in ("weight", "2:4", "block:2x2"):
        digests = []
        for criterion in ("plain", "l1"):
            torch.manual_seed(0)
            config = PruningConfig(criterion=criterion, granularity=granularity, target=0.5)
            digests.append(hfprune.prune(MLP(), config).masks.digest())
        assert digests[0] == digests[1]


def test_a_class_with_parameters(register):
    @register("squared")
    class Squared(Criterion):
        def __init__(self, *, scale=1.0, **common):
            super().__init__(**common)
            self.scale = scale

        def terms(self, name, weight):
            return weight.square() * self.scale

    criterion = create("squared", {"scale": 2.0, "batches": 3}, seed=5)
    assert isinstance(criterion, Squared)
    assert (criterion.scale, criterion.batches, criterion.seed) == (2.0, 3, 5)
    assert hfprune.prune(MLP(), PruningConfig(criterion="squared", target=0.5)).pruned == 72


def test_a_name_is_given_once(register):
    with pytest.raises(ConfigError, match="^the criterion 'l1' is registered already$"):
        register("l1")(lambda weight: weight)


def test_a_parameter_without_a_default(register):
    with pytest.raises(ConfigError, match="^criterion 'x': the parameter 'power' needs a default; known: weight"):
        register("x")(lambda weight, power: weight)
    assert "x" not in criteria


@pytest.mark.parametrize(
    ("function", "found"),
    [(lambda weight: weight.sum(), r"\(\)"), (lambda weight: weight[:, :1], r"\(12, 1\)"), (lambda weight: 3, "int")],
)
def test_scores_of_another_shape(register, function, found):
    register("x")(function)
    model = MLP()
    before = model.first.weight.clone()
    with pytest.raises(ConfigError, match=rf"^criterion 'x': returned {found} for 'first.weight' of shape \(12, 8\)$"):
        hfprune.prune(model, PruningConfig(criterion="x", target=0.5))
    assert torch.equal(model.first.weight, before)


@pytest.mark.parametrize("granularity", ["weight", "2:4", "block:2x2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite(register, granularity, value):
    register("x")(lambda weight: torch.full_like(weight, value))
    with pytest.raises(hfprune.HfpruneError, match="^pruning.criterion: 'x' gave scores that are not finite in 'first"):
        hfprune.prune(MLP(), PruningConfig(criterion="x", granularity=granularity, target=0.5))


def test_scores_of_whole_numbers(register):
    register("x")(lambda weight: (weight > 0).long())
    assert hfprune.prune(MLP(), PruningConfig(criterion="x", target=0.5)).pruned == 72


def test_a_function_may_take_any_statistic(register):
    @register("mixed")
    def mixed(weight, input_norm, squared_gradient, active_fraction, activation_entropy, curvature, synaptic_flow):
        for value in (input_norm, squared_gradient, active_fraction, activation_entropy, curvature, synaptic_flow):
            assert torch.broadcast_shapes(value.shape, weight.shape) == weight.shape
        return weight.abs() * input_norm + active_fraction + activation_entropy + synaptic_flow + curvature

    first = hfprune.prune(MLP(), PruningConfig(criterion="mixed", target=0.5), iter([vectors(), vectors(seed=2)]))
    assert first.pruned == 72


def test_wanda_by_a_function(register):
    register("product")(lambda weight, input_norm: weight.abs() * input_norm)
    config = {"granularity": "2:4", "target": 0.5, "ignore": ["last"]}  # what `last` is given depends on what went
    one, two = MLP(), MLP()
    two.load_state_dict(one.state_dict())
    left = hfprune.prune(one, PruningConfig(criterion="product", **config), vectors())
    right = hfprune.prune(two, PruningConfig(criterion="wanda", **config), vectors())
    assert left.masks.digest() == right.masks.digest()
