"""Every registered criterion x granularity x tiny model through the same invariants; a new one joins by itself."""

import pytest
import torch

import hfprune
from hfprune import PruningConfig
from hfprune.criteria import criteria
from hfprune.criteria.calibration import default_loss
from hfprune.errors import ConfigError, ModelError
from hfprune.pruner import Pruner
from tests.support.models import TINY, logits

MODELS = ("cnn", "convolutions", "lstm", "attention", "vit", "gpt2", "timm_resnet")
GRANULARITIES = ("weight", "2:4", "block:4x2")
OF_WEIGHTS = [
    name
    for name in criteria
    if not (criteria[name].of_blocks or criteria[name].of_units or criteria[name].of_components)
]
HIDDEN_INPUTS = ("lstm", "attention")
"""Models with weights that no linear layer or convolution of their own is called for."""
REMOVALS = {
    "mlp": ("channel",),
    "cnn": ("channel", "rank"),
    "timm_resnet": ("channel",),
    "vit": ("head", "head_dim", "neuron", "width", "layer", "rank"),
    "gpt2": ("head", "head_dim", "neuron", "layer", "rank"),
    "llama": ("head", "head_dim", "neuron", "rank"),
}


# What a criterion can't score, and why: the whole of the one line that says so need not be repeated here.
NO_NORM = {(name, kind) for name in ("vit", "gpt2", "llama") for kind in ("head", "head_dim", "neuron")}
NO_INPUT = {("vit", "head_dim"), ("llama", "head_dim")}
"""Groups of queries and keys, which no layer takes."""


def refusal(criterion, granularity, name):
    """What is said where a criterion does not apply; None where it does."""
    kind = criteria[criterion]
    if granularity == "rank":
        return None if kind.scores_components else f"'{criterion}' can't score the components of factored weights"
    if kind.of_components:
        return f"'{criterion}' scores the components of factored weights, not '{granularity}'"
    if kind.of_blocks and granularity != "layer":
        return f"'{criterion}' scores whole blocks, not '{granularity}'; use it with granularity: layer"
    if kind.of_units and granularity in (*GRANULARITIES, "layer"):
        return f"'{criterion}' scores whole units of a layer, not '{granularity}'"
    if criterion == "bn_scale" and (name, granularity) in NO_NORM:
        return "has no norm with a scale; name it in `ignore`"
    if kind.members == "inputs" and (name, granularity) in NO_INPUT:
        return "which is the input of no linear layer or convolution; name it in `ignore`"
    if criterion == "sparsegpt" and granularity not in ("weight", "2:4"):
        return f"'sparsegpt' prunes single weights, not '{granularity}'"
    if kind.layerwise and name in HIDDEN_INPUTS:
        by_visit = granularity in ("weight", "2:4")
        return "looks at the inputs of linear layers and convolutions" if by_visit else "its input can't be seen"
    return None


def assert_refused(model, config, batch, words):
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    with pytest.raises((ConfigError, ModelError)) as error:
        hfprune.prune(model, config, batch)
    assert words in str(error.value)
    assert f"'{config.criterion_name}'" in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def tiny(name):
    return TINY[name]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("criterion", sorted(set(criteria) - set(OF_WEIGHTS)))
def test_what_does_not_apply_to_masks(criterion, granularity):
    config = PruningConfig(criterion=criterion, granularity=granularity, target=0.5)
    words = refusal(criterion, granularity, "cnn")
    assert words is not None
    assert_refused(TINY["cnn"].build(), config, TINY["cnn"].batch(), words)


def updates(criterion):
    return criteria[criterion].layerwise and criteria[criterion].updates


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("criterion", OF_WEIGHTS)
def test_invariants(tmp_path, name, tiny, criterion, granularity):
    config = PruningConfig(criterion=criterion, granularity=granularity, target=0.5, seed=3)
    batch = tiny.batch()
    model = tiny.build().eval()
    if words := refusal(criterion, granularity, name):
        assert_refused(model, config, batch, words)
        return
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    report = hfprune.prune(model, config, batch)

    # The count is exact, what is gone is zero, what is kept is the same to the last bit where the method leaves it so.
    assert report.units == Pruner(model, config).total_units
    assert report.pruned == round(0.5 * report.units)
    if granularity != "block:4x2":
        assert report.masks.zeros == report.pruned
    for name, value in model.named_parameters():
        kept = report.masks.kept.get(name, torch.ones_like(value, dtype=torch.bool))
        assert not value[~kept].any()
        assert not torch.signbit(value[~kept]).any()
        if not updates(criterion) or name not in report.masks:
            assert torch.equal(value[kept], before[name][kept])

    # The same seed chooses the same again.
    torch.manual_seed(0)
    other = tiny.build().eval()
    other.load_state_dict(model.state_dict() | before, strict=False)
    masks = hfprune.prune(other, config, batch).masks
    assert masks.digest() == report.masks.digest()

    # Zeros stay zero under momentum and weight decay, of momenta that the removed weights still have.
    for kind, options in ((torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})):
        parameters = list(other.parameters())
        optimizer = kind(parameters, lr=0.01, weight_decay=0.1, **options)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            assert any(other.get_parameter(name)[~mask].any() for name, mask in masks.kept.items())
            masks.enforce()
            assert not any(other.get_parameter(name)[~mask].any() for name, mask in masks.kept.items())

    # What is saved is what was recorded, and answers alike.
    hfprune.save_pretrained(model, tmp_path)
    found = hfprune.verify(tmp_path)
    assert found.ok
    assert found.zeros >= report.masks.zeros > 0
    again = hfprune.from_pretrained(tmp_path, tiny.build if tiny.kind == "own" else None)
    assert torch.equal(logits(again, batch), logits(model, batch))


@pytest.mark.parametrize("criterion", OF_WEIGHTS)
def test_steps_reach_the_same_count(name, tiny, criterion):
    config = PruningConfig(criterion=criterion, target=0.7, schedule={"kind": "geometric", "steps": 3})
    model = tiny.build().eval()
    if words := refusal(criterion, "weight", name):
        assert_refused(model, config, tiny.batch(), words)
        return
    report = hfprune.prune(model, config, tiny.batch())
    assert report.masks.zeros == round(0.7 * report.units)


@pytest.mark.parametrize("criterion", list(criteria))
@pytest.mark.parametrize("name, granularity", [(name, kind) for name, kinds in REMOVALS.items() for kind in kinds])
def test_invariants_of_removal(tmp_path, name, granularity, criterion):
    tiny = TINY[name]
    batch = tiny.batch()
    config = PruningConfig(criterion=criterion, granularity=granularity, target=0.5, seed=3, round_to=1)
    model = tiny.build().eval()
    dense = {name: value.detach().clone() for name, value in model.state_dict().items()}
    if words := refusal(criterion, granularity, name):
        assert_refused(model, config, batch, words)
        return
    report = hfprune.prune(model, config, batch)

    # As much as was asked is gone, nothing is empty, and gradients reach all that is left.
    assert abs(report.pruned / report.units - 0.5) <= 0.02 or report.note
    assert all(0 < kept <= units for units, kept in report.groups.values())
    assert sum(p.numel() for p in model.parameters()) < sum(value.numel() for value in dense.values())
    logits(model, batch)
    default_loss(model, batch).backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())

    # The same seed chooses the same again.
    other = tiny.build().eval()
    other.load_state_dict(dense)
    assert hfprune.prune(other, config, batch).plan == report.plan

    # What is saved answers alike.
    hfprune.save_pretrained(model, tmp_path)
    assert hfprune.verify(tmp_path).ok
    again = hfprune.from_pretrained(tmp_path, tiny.build if tiny.kind == "own" else None)
    # Ranks are odd, and a product rounds as its tensors lie in memory.
    assert torch.allclose(logits(again, batch), logits(model, batch), rtol=0, atol=1e-6 if granularity == "rank" else 0)


def test_a_criterion_joins_by_being_registered():
    known = {"random", "l1", "l2", "lamp", "bn_scale", "fpgm", "fermat", "taylor", "snip", "synflow", "movement", "obd"}
    known |= {"fisher", "apoz", "mean_activation", "entropy", "wanda", "block_influence"}
    known |= {"singular_value", "whitening"}
    assert known <= set(criteria)
