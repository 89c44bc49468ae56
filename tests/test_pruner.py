"""What a configuration means for a model: units, exact counts, scopes, limits, patterns."""

import pytest
import torch
from torch import nn

import hfprune
from hfprune import PruningConfig
from hfprune.errors import ConfigError
from hfprune.pruner import Pruner
from tests.support.models import CNN, MLP, TINY, Convolutions, Tied, gpt2

STEPS = {"kind": "geometric", "steps": 4}


def zeros(model):
    return {name: int((value == 0).sum()) for name, value in model.named_parameters()}


def refusal(model, **values):
    with pytest.raises(ConfigError) as error:
        Pruner(model, PruningConfig(**values))
    assert "\n" not in str(error.value)
    return str(error.value)


def flat(model, names):
    return torch.cat([model.get_parameter(name).detach().flatten().double() for name in names])


@pytest.mark.parametrize("ratio", [0.0, 0.001, 1 / 3, 0.5, 0.917, 0.999])
@pytest.mark.parametrize("name", TINY)
def test_global_magnitude_takes_the_smallest_of_all(name, ratio):
    model = TINY[name].build()
    names = list(Pruner(model, PruningConfig(target=0)).weights)
    before = flat(model, names)
    already = int((before == 0).sum())
    report = hfprune.prune(model, PruningConfig(criterion="l1", target=ratio))
    after = flat(model, names)
    expected = round(ratio * len(before))
    assert report.pruned == report.masks.zeros == expected
    assert report.units == len(before)
    assert report.achieved == expected / len(before)
    assert int((after == 0).sum()) == max(expected, already)
    limit = before.abs().sort(stable=True).values[expected - 1] if expected else -1
    assert torch.equal(after[before.abs() > limit], before[before.abs() > limit])


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.505, 0.99])
@pytest.mark.parametrize("schedule", ["one_shot", STEPS])
def test_scope_layer_takes_the_ratio_of_every_layer(ratio, schedule):
    model = CNN()
    report = hfprune.prune(model, PruningConfig(target=ratio, scope="layer", schedule=schedule))
    counts = zeros(model)
    assert {name: counts[name] for name in report.masks} == {
        name: round(ratio * model.get_parameter(name).numel())
        for name in ("conv1.weight", "conv2.weight", "head.weight")
    }
    assert report.pruned == sum(counts[name] for name in report.masks)


def test_layers_with_a_ratio_of_their_own():
    model = CNN()
    config = PruningConfig(target=0.6, per_layer={"conv1": 0.25, "h*": 0.0}, schedule=STEPS)
    report = hfprune.prune(model, config)
    counts = zeros(model)
    assert counts["conv1.weight"] == round(0.25 * 216) == 54
    assert counts["head.weight"] == 0
    assert counts["conv2.weight"] == round(0.6 * 864)
    assert report.pruned == 54 + round(0.6 * 864)


def test_the_first_pattern_decides():
    model = CNN()
    hfprune.prune(model, PruningConfig(target=0.6, per_layer={"conv1": 0.25, "conv*": 0.75}))
    assert zeros(model)["conv1.weight"] == 54
    assert zeros(model)["conv2.weight"] == 648


def test_own_ratios_grow_along_the_schedule():
    model = CNN()
    config = PruningConfig(target=0.8, per_layer={"conv1": 0.4}, schedule=STEPS)
    pruner = Pruner(model, config)
    counts = [pruner.select(target).sparsity()["conv1.weight"].zeros for target in config.targets()]
    assert counts == [round(0.4 * target / 0.8 * 216) for target in config.targets()]
    assert counts[-1] == round(0.4 * 216)


@pytest.mark.parametrize(("least", "kept"), [(5, [5, 5, 5]), (0.1, [22, 87, 5]), (1, [1, 1, 1])])
def test_every_layer_keeps_its_least(least, kept):
    model = CNN()
    with torch.no_grad():
        model.conv1.weight.mul_(1e-3)
        model.head.weight.mul_(1e-3)
    report = hfprune.prune(model, PruningConfig(target=0.85, min_kept=least))
    left = {name: model.get_parameter(name).numel() - count for name, count in zeros(model).items()}
    assert [left["conv1.weight"], left["head.weight"]] == [kept[0], kept[2]]
    assert left["conv2.weight"] >= kept[1]
    assert report.masks.zeros == round(0.85 * 1128)


def test_what_min_kept_does_not_allow():
    assert refusal(CNN(), target=0.95, min_kept=0.1) == (
        "pruning.target.ratio: 0.95 can't be reached with min_kept 0.1; at most 0.8989"
    )
    hfprune.prune(CNN(), PruningConfig(target=0.8989, min_kept=0.1))
    assert refusal(CNN(), target=0.95, min_kept=5, scope="layer") == (
        "pruning.min_kept: 5 keeps more of 'head.weight' (48 units) than the ratio 0.95 does; "
        "use scope: global, or a smaller one"
    )
    assert refusal(CNN(), target=0.1, min_kept=0.5, per_layer={"head": 0.9}) == (
        "pruning.per_layer: 0.9 for 'head.weight' removes more than min_kept allows"
    )


def test_patterns_that_match_nothing():
    assert refusal(CNN(), target=0.5, per_layer={"conv3": 0.1}) == (
        "pruning.per_layer: 'conv3' matches nothing in the model; did you mean 'conv2'?"
    )
    assert refusal(CNN(), target=0.5, per_layer={"norm1": 0.1}).startswith("pruning.per_layer: 'norm1' matches nothing")
    assert refusal(CNN(), target=0.5, ignore=["haed"]) == (
        "pruning.ignore: 'haed' matches nothing in the model; did you mean 'head'?"
    )
    assert refusal(CNN(), target=0.5, criterion="l3").startswith("pruning.criterion: unknown criterion 'l3'; did you")


def test_only_what_is_named_is_touched():
    model = CNN()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hfprune.prune(model, PruningConfig(target=0.5, include=["conv*"], ignore=["conv2"]))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"conv1.weight"}


def test_biases_and_norms_by_name():
    model = CNN()
    with torch.no_grad():
        model.norm1.weight.copy_(torch.arange(1.0, 9))
    report = hfprune.prune(model, PruningConfig(target=0.5, include=["norm1"]))
    assert report.units == 8
    assert model.norm1.weight.tolist() == [0, 0, 0, 0, 5, 6, 7, 8]
    hfprune.prune(model, PruningConfig(target=0.5, include=["*.bias"], ignore=["norm*"]))
    assert int((model.conv1.bias == 0).sum() + (model.head.bias == 0).sum()) == 6


def test_a_tied_weight_is_counted_once():
    model = Tied()
    report = hfprune.prune(model, PruningConfig(target=0.5))
    assert report.units == 64 + 32
    assert report.pruned == 48
    assert model.lower.weight is model.upper.weight


def test_an_embedding_by_name():
    model = gpt2()
    report = hfprune.prune(model, PruningConfig(target=0.25, include=["lm_head"]))
    assert report.units == 32 * 16
    assert int((model.transformer.wte.weight == 0).sum()) == 128
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("granularity", ["weight", "2:4", "block:2x3"])
def test_every_precision(dtype, granularity):
    model = CNN().to(dtype)
    before = {name: value.clone() for name, value in model.named_parameters()}
    report = hfprune.prune(model, PruningConfig(granularity=granularity, target=0.5))
    assert report.achieved == pytest.approx(0.5, abs=1e-3)
    for name, mask in report.masks.kept.items():
        value = model.get_parameter(name)
        assert value.dtype == dtype
        assert torch.equal(value, torch.where(mask, before[name], torch.zeros_like(value)))
        # A random weight is hardly ever zero by itself, except in the half formats.
        assert int((value == 0).sum()) >= int((~mask).sum())


@pytest.mark.parametrize("granularity", ["weight", "2:4", "block:2x3"])
@pytest.mark.parametrize("criterion", ["l1", "lamp"])
def test_channels_last_changes_nothing(granularity, criterion):
    first, second = CNN(), CNN().to(memory_format=torch.channels_last)
    second.load_state_dict(first.state_dict())
    assert not second.conv2.weight.is_contiguous()
    config = PruningConfig(criterion=criterion, granularity=granularity, target=0.5)
    reports = [hfprune.prune(model, config) for model in (first, second)]
    assert reports[0].masks.digest() == reports[1].masks.digest()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert second.conv2.weight.is_contiguous(memory_format=torch.channels_last)


def test_an_odd_number_of_units():
    model = nn.Linear(7, 3, bias=False)
    assert hfprune.prune(model, PruningConfig(target=0.5)).pruned == 10  # round(10.5), to even
    assert int((model.weight == 0).sum()) == 10


@pytest.mark.parametrize("granularity", ["weight", "block:2x2", "2:4"])
@pytest.mark.parametrize("criterion", ["l1", "random", "lamp", "taylor"])
def test_several_steps_are_monotone_and_exact(granularity, criterion):
    model, data = MLP(), TINY["mlp"].batch()
    config = PruningConfig(criterion=criterion, granularity=granularity, target=0.5, schedule=STEPS)
    pruner = Pruner(model, config)
    masks = None
    for target in config.targets():
        after = pruner.select(target, masks, data=data)
        if masks is not None:
            assert all(bool((masks.kept[name] | ~after.kept[name]).all()) for name in masks)
        if granularity != "block:2x2":
            assert after.zeros == pruner.wanted(target)
        masks = after.apply(model)
    assert pruner.wanted(target) == round(0.5 * pruner.total_units)


@pytest.mark.parametrize("criterion", ["l1", "random"])
def test_steps_of_a_fixed_score_end_where_one_shot_ends(criterion):
    first, second = CNN(), CNN()
    second.load_state_dict(first.state_dict())
    one = hfprune.prune(first, PruningConfig(criterion=criterion, target=0.7, seed=3))
    many = hfprune.prune(second, PruningConfig(criterion=criterion, target=0.7, seed=3, schedule=STEPS))
    assert one.masks.digest() == many.masks.digest()


def test_the_seed_decides():
    digests = []
    for seed in (0, 0, 1):
        digests.append(hfprune.prune(CNN(), PruningConfig(criterion="random", target=0.5, seed=seed)).masks.digest())
    assert digests[0] == digests[1] != digests[2]


def groups(weight, value, size):
    """The groups along the input dimension, one a row, and what is left over."""
    rows = weight.input_last(value)
    whole = rows.shape[-1] // size * size
    return rows[..., :whole].reshape(-1, size), rows[..., whole:]


@pytest.mark.parametrize("granularity", ["2:4", "1:4", "2:3", "1:2", "6:8"])
@pytest.mark.parametrize("build", [MLP, CNN, Convolutions, gpt2, TINY["lstm"].build, TINY["attention"].build])
@pytest.mark.parametrize("schedule", ["one_shot", {"kind": "constant", "steps": 3}])
def test_patterns_keep_exactly_n_of_every_m(build, granularity, schedule):
    model = build()
    kept, size = map(int, granularity.split(":"))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    report = hfprune.prune(model, PruningConfig(granularity=granularity, schedule=schedule))
    for name, weight in Pruner(model, PruningConfig(granularity=granularity)).weights.items():
        mask, rest = groups(weight, report.masks.kept[name], size)
        assert bool((mask.sum(1) == kept).all())
        assert bool(rest.all())
        values, _ = groups(weight, before[name].abs(), size)
        low = values.masked_fill(mask, -1).amax(1)
        assert bool((low <= values.masked_fill(~mask, torch.inf).amin(1)).all())
        assert torch.equal(weight.parameter, before[name] * report.masks.kept[name])
    assert report.pruned == report.masks.zeros
    assert report.achieved == pytest.approx(1 - kept / size)
    assert report.masks.pattern == granularity


def test_a_pattern_that_fits_no_layer():
    assert refusal(nn.Linear(3, 8), granularity="2:4") == (
        "pruning.granularity: no layer's input dimension holds a group of 4, so nothing of '2:4' can be pruned"
    )


def test_a_pattern_over_a_single_number_finds_no_group():
    model = MLP()
    model.scale = nn.Parameter(torch.ones(()))
    assert refusal(model, granularity="2:4", include=["scale"]).startswith("pruning.granularity: no layer's input")
    assert hfprune.prune(model, PruningConfig(granularity="2:4", include=["scale", "first"])).pruned == 48


@pytest.mark.parametrize("criterion", ["l1", "l2"])
@pytest.mark.parametrize("build", [MLP, CNN, Convolutions, gpt2])
def test_blocks_go_whole(build, criterion):
    model = build()
    config = PruningConfig(criterion=criterion, granularity="block:3x5", target=0.4)
    pruner = Pruner(model, config)
    report = hfprune.prune(model, config)
    gone, blocks = 0, 0
    for name, weight in pruner.weights.items():
        mask = weight.as_matrix(report.masks.kept[name])
        for top in range(0, mask.shape[0], 3):
            for left in range(0, mask.shape[1], 5):
                part = mask[top : top + 3, left : left + 5]
                assert bool(part.all()) or not part.any()
                gone += not part.any()
                blocks += 1
    assert report.units == blocks
    assert report.pruned == gone == round(0.4 * blocks)


def test_a_block_at_the_edge_is_judged_by_its_mean():
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1.0, 1.5], [1.0, 1.0, 1.5]]))
    hfprune.prune(model, PruningConfig(granularity="block:2x2", target=0.5))
    assert model.weight.tolist() == [[0, 0, 1.5], [0, 0, 1.5]]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"granularity": "block:64x64", "target": 0.5},
            "pruning.granularity: 'block:64x64' is too large: 'first.weight' (and 1 more) is one of them, and a ratio "
            "of 0.5 must empty a layer",
        ),
        (
            {"granularity": "block:12x8", "target": 0.6, "scope": "layer"},
            "pruning.granularity: 'block:12x8' is too large: a ratio of 0.6 empties 'first.weight', that is 1 of them",
        ),
        (
            {"granularity": "block:4x6", "target": 0.1, "per_layer": {"last": 0.8}},
            "pruning.granularity: 'block:4x6' is too large: a ratio of 0.8 empties 'last.weight', that is 2 of them",
        ),
    ],
)
def test_blocks_that_empty_a_layer_are_refused(values, line):
    with pytest.raises(ConfigError) as error:
        Pruner(TINY["mlp"].build(), PruningConfig(**values))
    assert str(error.value) == line


def test_a_layer_that_is_a_single_block_is_warned_of(recwarn):
    model, values = TINY["mlp"].build(), {"granularity": "block:12x8", "target": 0.3}
    with pytest.warns(UserWarning, match="'first.weight' is one of them, which stays or goes as a whole; min_kept: 1"):
        Pruner(model, PruningConfig(**values))
    recwarn.clear()
    Pruner(model, PruningConfig(**values, min_kept=1))
    Pruner(model, PruningConfig(granularity="block:4x4", target=0.5))
    assert not recwarn.list
