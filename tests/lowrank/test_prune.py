"""prune() with the granularity rank: the target is met exactly, the result is the product's, or nothing is changed."""

import copy

import pytest
import torch
from torch import nn

import hfprune
from hfprune import PruningConfig
from hfprune.checkpoint.metadata import plan_of
from hfprune.criteria.calibration import example_inputs_of
from hfprune.errors import ConfigError, ModelError
from hfprune.lowrank import pruner as lowrank_pruner
from hfprune.lowrank.factor import Factored, factored_layers, merged, put
from hfprune.weights import is_transposed_linear
from tests.support.models import TINY, logits


def config(**options):
    return PruningConfig(**{"granularity": "rank", "target": {"params": 0.7}, "round_to": 1, "seed": 3} | options)


def build(name):
    torch.manual_seed(0)
    return TINY[name].build().eval()


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def macs(model, batch):
    return hfprune.measure(model, example_inputs_of(batch), latency=False).macs


def assert_untouched(model, before):
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    values = before.state_dict()
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def with_products(model):
    """The model with every factored layer as a dense one."""
    dense = copy.deepcopy(model)
    for layer in factored_layers(dense).values():
        put(dense, layer, merged(layer))
    return dense


@pytest.mark.parametrize("criterion", ["singular_value", "whitening", "taylor"])
@pytest.mark.parametrize("name", ["cnn", "vit", "gpt2", "llama", "timm_resnet"])
def test_the_target_is_met_and_the_result_is_the_product_s(name, criterion):
    model, batch = build(name), TINY[name].batch()
    dense, count = copy.deepcopy(model), parameters(model)
    report = hfprune.prune(model, config(criterion=criterion), batch)
    assert parameters(model) == round((1 - report.achieved) * count)
    assert report.achieved == pytest.approx(0.3, abs=0.02)
    products = with_products(model)
    assert [type(m) for m in products.modules()] == [type(m) for m in dense.modules()]
    assert torch.allclose(logits(model, batch), logits(products, batch), atol=1e-5)
    for path, layer in factored_layers(model).items():
        before = dense.get_submodule(path)
        rows, columns = before.weight.shape[0], before.weight[0].numel()
        assert layer.rank * (rows + columns) < rows * columns
        assert report.groups[path] == (min(rows, columns), layer.rank)
        assert layer.product().shape == before.weight.shape and layer.transposed == is_transposed_linear(before)
    # What is not factored is as it was.
    same = [name for name, value in products.state_dict().items() if torch.equal(value, dense.state_dict()[name])]
    factored = {f"{path}.weight" for path in factored_layers(model)}
    assert factored and set(same) == set(dense.state_dict()) - factored


@pytest.mark.parametrize("name", ["vit", "llama", "timm_resnet"])
def test_macs_are_those_measured(name):
    model, batch = build(name), TINY[name].batch()
    dense = macs(model, batch)
    report = hfprune.prune(model, config(target={"macs": 0.6}), batch)
    assert 1 - report.achieved == pytest.approx(macs(model, batch) / dense, abs=1e-9)
    assert report.achieved == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("scope", ["global", "layer", "isomorphic"])
def test_a_ratio_counts_components(scope):
    model = build("llama")
    report = hfprune.prune(model, config(target=0.6, scope=scope), TINY["llama"].batch())
    assert report.pruned == sum(units - kept for units, kept in report.groups.values())
    assert report.pruned / report.units == pytest.approx(report.achieved)
    assert report.achieved == pytest.approx(0.6, abs=0.02) or report.note
    if scope == "layer":  # every layer keeps the same fraction
        assert all(kept == int(0.4 * units) for units, kept in report.groups.values())


def test_the_smaller_ones_are_nested_in_the_larger_ones():
    """Without training between, a step keeps the leading components of the step before."""
    model, batch = build("llama"), TINY["llama"].batch()
    weights = []
    for left in (0.8, 0.64):
        hfprune.prune(model, config(criterion="singular_value", target={"params": 0.8}), batch)
        weights.append({p: (layer.rank, layer.product().detach()) for p, layer in factored_layers(model).items()})
        assert parameters(model) == pytest.approx(left * parameters(build("llama")), rel=0.03)
    for large, small in zip(weights, weights[1:], strict=False):
        assert large.keys() <= small.keys()
        for path, (rank, weight) in large.items():
            kept, rest = small[path][1], weight - small[path][1]
            assert small[path][0] <= rank
            assert (kept.t() @ rest).abs().max() < 1e-5 and (kept @ rest.t()).abs().max() < 1e-5


def test_steps_reach_what_one_step_does():
    once, steps = build("vit"), build("vit")
    schedule = {"kind": "constant", "steps": 3}
    one = hfprune.prune(once, config(criterion="singular_value"))
    three = hfprune.prune(steps, config(criterion="singular_value", schedule=schedule))
    assert one.achieved == pytest.approx(three.achieved, abs=0.02)
    assert set(plan_of(steps).factored) == set(factored_layers(steps))


@pytest.mark.parametrize("granularity", [["head", "neuron", "rank"], ["layer", "rank"]])
def test_beside_units(granularity):
    model, batch = build("llama"), TINY["llama"].batch()
    count = parameters(model)
    report = hfprune.prune(model, config(granularity=granularity, target={"params": 0.4}), batch)
    assert parameters(model) / count == pytest.approx(0.4, abs=0.01)
    assert parameters(model) == round((1 - report.achieved) * count)
    kinds = {name.endswith(" (rank)") or isinstance(value, Factored) for name, value in model.named_modules()}
    assert kinds == {True, False}
    plan = plan_of(model)
    assert plan.factored and (plan.attributes or plan.dropped)
    gone = sum(units - kept for units, kept in report.groups.values()) + len(plan.dropped)
    assert gone == report.pruned


def test_what_is_left_alone():
    model = build("vit")
    options = {"ignore": ["classifier", "*.q_proj"], "per_layer": {"*.k_proj": 0.75, "*.v_proj": 0.1}, "min_kept": 0.25}
    report = hfprune.prune(model, config(criterion="singular_value", **options))
    found = factored_layers(model)
    assert not any(path.endswith(("q_proj", "classifier", "v_proj")) for path in found)
    keys = {path: layer for path, layer in found.items() if path.endswith("k_proj")}
    assert keys and all(layer.rank == layer.in_features // 4 for layer in keys.values())
    assert all(layer.rank >= report.groups[path][0] / 4 for path, layer in found.items())


def test_ranks_are_multiples():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    hfprune.prune(model, config(round_to=8, criterion="l2"), example_inputs=torch.randn(2, 64))
    assert {layer.rank % 8 for path, layer in factored_layers(model).items() if path != "4"} == {0}


def test_shared_modules_and_weights():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.tied, self.other = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.again, self.tied.weight = self.other, self.one.weight

        def forward(self, x):
            return self.again(self.other(self.tied(self.one(x))))

    model, x = Shared(), torch.randn(3, 16)
    before = macs(model, x)
    report = hfprune.prune(model, config(target={"macs": 0.8}), example_inputs=x)
    assert isinstance(model.other, Factored) and model.again is model.other
    assert type(model.one) is nn.Linear and model.tied.weight is model.one.weight
    assert macs(model, x) == (1 - report.achieved) * before <= 0.8 * before


def test_a_weight_that_code_computes_with_stays_dense():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.called, self.read, self.asked = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x):
            x = nn.functional.linear(self.called(x), self.read.weight, self.read.bias)
            return self.asked(x.to(self.asked.weight.dtype).to(self.asked.weight.device))

    model, x = Reads(), torch.randn(3, 16)
    before = macs(model, x)
    report = hfprune.prune(model, config(target={"macs": 0.5}), example_inputs=x)
    assert set(factored_layers(model)) == {"called", "asked"} == set(report.groups)
    assert 1 - report.achieved == pytest.approx(macs(model, x) / before)


def test_it_trains_on():
    model, batch = build("vit"), TINY["vit"].batch()
    model.vit.requires_grad_(False)
    hfprune.prune(model, config(), batch)
    for name, value in model.named_parameters():
        assert value.requires_grad == (not name.startswith("vit.")), name
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(p.grad is not None for n, p in model.named_parameters() if "factor" in n)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": {"params": 0.05}}, r"target.params: 5.00% of the dense model can't be reached; .* are \d"),
        ({"target": {"macs": 0.01}}, "target.macs: 1.00% of the dense model can't be reached"),
        ({"target": 0.99}, "target.ratio: 1.00% of the components can't be reached"),
        ({"target": {"params": 1e9}}, "less than that already"),
        ({"include": ["*.embeddings.word_embeddings"]}, "no linear layer or convolution"),
        ({"ignore": ["nothing.*"]}, "ignore"),
        ({"per_layer": {"nothing.*": 0.5}}, "per_layer"),
        ({"criterion": "fisher"}, "'fisher' can't score the components of factored weights; known: l1"),
        ({"criterion": "taylor"}, "needs data"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_can_t_be_done_is_refused_before_anything_changes(options, message):
    model = build("bert")
    before = copy.deepcopy(model)
    with pytest.raises(ConfigError, match=message) as error:
        hfprune.prune(model, config(**options))
    assert "\n" not in str(error.value)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": {"latency": 0.5}}, "target.latency: ranks"),
        ({"granularity": ["rank", "head"], "target": 0.5}, "target.ratio: components"),
        ({"granularity": ["rank", "head"], "per_layer": {"*": 0.5}}, "per_layer"),
        ({"per_layer": [0.5]}, "per_layer"),
        ({"granularity": ["rank", "weight"]}, "can't stand in a list"),
        ({"export_sizes": [0.4, 0.6]}, "export_sizes"),
        ({"export_sizes": [1.0]}, "export_sizes"),
        ({"export_sizes": [0.8, 0.6]}, "target: export_sizes ends at 0.6"),
        ({"export_sizes": [0.8, 0.7], "schedule": "geometric"}, "schedule: export_sizes says the steps"),
        ({"granularity": "weight", "target": 0.5, "export_sizes": [0.5]}, "export_sizes: zeros"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_configurations_that_say_nothing_sensible(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_sizes_are_the_targets():
    said = PruningConfig(granularity="rank", export_sizes=[0.8, 0.5])
    assert said.targets() == pytest.approx([0.2, 0.5]) and said.target.params == 0.5
    assert config(target={"macs": 0.5}, export_sizes=[0.8, 0.5]).target.kind == "macs"


@pytest.mark.parametrize("granularity", ["rank", ["neuron", "rank"]])
def test_a_wrong_factor_does_not_pass_the_proof(monkeypatch, granularity):
    model, batch = build("vit"), TINY["vit"].batch()
    before = copy.deepcopy(model)

    class Wrong(Factored):
        def forward(self, x):
            return super().forward(x) * 1.1

    def factored_like(module, rank):
        layer = original(module, rank)
        layer.__class__ = Wrong
        return layer

    original = lowrank_pruner.factored_like
    monkeypatch.setattr(lowrank_pruner, "factored_like", factored_like)
    with pytest.raises(ModelError, match="differs from that of the products"):
        hfprune.prune(model, config(granularity=granularity, target={"params": 0.6}), batch)
    assert_untouched(model, before)


def test_weights_held_at_zero_are_not_filled():
    model = build("vit")
    hfprune.prune(model, PruningConfig(target=0.5, include=["*.mlp.*"]))
    with pytest.raises(ConfigError, match="is held at zero where it was pruned.*ignore 'vit"):
        hfprune.prune(model, config())
    hfprune.prune(model, config(target={"params": 0.9}, ignore=["*.mlp.*"]))
    assert factored_layers(model)


def test_values_that_are_not_finite():
    model = build("vit")
    weight = model.classifier.weight
    with torch.no_grad():
        weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="'classifier.weight' holds values that are not finite"):
        hfprune.prune(model, config())
    assert not factored_layers(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype):
    model = build("llama").to(dtype)
    hfprune.prune(model, config(target={"params": 0.7}), TINY["llama"].batch())
    assert {p.dtype for p in model.parameters()} == {dtype} and factored_layers(model)
