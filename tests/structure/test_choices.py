"""Every kind of tiny model x scope x target x granularity through the same invariants."""

import itertools

import pytest
import torch
from torch import nn

import hfprune
from hfprune import PruningConfig
from hfprune.errors import ConfigError
from hfprune.structure.groups import analyse
from tests.support.models import TINY, logits
from tests.support.structures import spread

SCOPES = ("global", "layer", "isomorphic")
TARGETS = ({"ratio": 0.5}, {"params": 0.6}, {"macs": 0.5})
WHOLE = ("cnn",)
OTHERS = ("mlp", "convolutions", "vit", "bert", "timm_vit", "timm_resnet")
KINDS = {"vit": ("head", "neuron", "width"), "gpt2": ("head", "neuron"), "llama": ("head",), "timm_resnet": ("width",)}
CASES = [
    *((name, "channel", *choice) for name in WHOLE for choice in itertools.product(SCOPES, TARGETS)),
    *((name, "channel", *choice) for name in OTHERS for choice in zip(SCOPES, TARGETS, strict=True)),
    *((name, "channel", "isomorphic", {"macs": 0.5}) for name in ("llama", "gpt2")),
    *((name, kind, "layer", {"ratio": 0.5}) for name, kinds in KINDS.items() for kind in kinds),
]


def made(name):
    """The model, and what it takes without labels."""
    torch.manual_seed(0)
    tiny = TINY[name]
    batch = tiny.batch()
    inputs = {k: v for k, v in batch.items() if k != "labels"} if isinstance(batch, dict) else (batch[0],)
    return spread(tiny.build()), inputs, batch


def sizes(model, inputs):
    """Parameters and multiply-accumulates, counted on the model itself."""
    found = hfprune.measure(model, inputs, latency=False)
    return {"params": found.params, "macs": found.macs}


def kept_units(structure, report):
    """Groups as they were, with the units that are left."""
    return [(group, report.groups[name][1]) for name, group in structure.groups.items() if name in report.groups]


@pytest.mark.parametrize(("name", "granularity", "scope", "target"), CASES, ids=lambda v: str(v).strip("{}"))
def test_invariants(name, granularity, scope, target):
    model, inputs, batch = made(name)
    dense, structure, answer = sizes(model, inputs), analyse(model, inputs), logits(model, batch)
    options = {"granularity": granularity, "scope": scope, "target": target, "round_to": 2}
    report = hfprune.prune(model, PruningConfig(**options), example_inputs=inputs)

    # The report says what can be counted on the model, and the target is met, or a note says why not.
    now = sizes(model, inputs)
    assert report.units == sum(before for before, _ in report.groups.values())
    assert report.pruned == sum(before - after for before, after in report.groups.values()) > 0
    ((measured, wanted),) = target.items()
    if measured == "ratio":
        assert report.achieved == pytest.approx(report.pruned / report.units)
        assert report.note or abs(report.achieved - wanted) <= 0.02
    else:
        assert 1 - report.achieved == pytest.approx(now[measured] / dense[measured], abs=1e-6)
        assert report.note or abs(1 - report.achieved - wanted) <= 0.02 * wanted

    # Nothing is empty, what is kept is rounded where it can be, nothing else than the granularity was cut.
    assert all(tensor.numel() for tensor in model.state_dict().values())
    for group, kept in kept_units(structure, report):
        assert kept >= 1
        assert granularity in ("channel", group.kind)
        if kept < group.units and group.units >= 4:
            assert kept * group.channels_per_unit % 2 == 0, group.name
    assert logits(model, batch).shape == answer.shape
    assert torch.isfinite(logits(model, batch)).all()


@pytest.mark.parametrize("criterion", ["l1", "random", "taylor"])
def test_the_same_seed_chooses_the_same(criterion):
    states = []
    for _ in range(2):
        model, inputs, batch = made("vit")
        config = PruningConfig(criterion=criterion, granularity="channel", target={"macs": 0.5}, seed=5, round_to=1)
        hfprune.prune(model, config, batch, example_inputs=inputs)
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("least", [5, 0.75])
def test_every_group_keeps_its_least(scope, least):
    model, inputs, _ = made("cnn")
    config = PruningConfig(granularity="channel", scope=scope, target=0.9, min_kept=least, round_to=1)
    if scope == "layer":
        report = hfprune.prune(model, config, example_inputs=inputs)
        assert report.note
        floors = [least if isinstance(least, int) else -(-3 * before // 4) for before, _ in report.groups.values()]
        assert [after for _, after in report.groups.values()] == floors
        return
    with pytest.raises(ConfigError, match="would empty a layer"):
        hfprune.prune(model, config, example_inputs=inputs)


@pytest.mark.parametrize(("scope", "round_to"), zip(SCOPES, (1, 4, 8), strict=True))
def test_what_is_kept_is_a_multiple(scope, round_to):
    model, inputs, _ = made("timm_resnet")
    groups = analyse(model, inputs).groups
    config = PruningConfig(granularity="channel", scope=scope, target=0.4, round_to=round_to)
    report = hfprune.prune(model, config, example_inputs=inputs)
    for name, (before, after) in report.groups.items():
        if after < before and before >= 2 * round_to:
            assert after * groups[name].channels_per_unit % round_to == 0


def test_include_and_ignore():
    model, inputs, _ = made("vit")
    groups = analyse(model, inputs).groups
    heads, neurons = ([name for name, group in groups.items() if group.kind == kind] for kind in ("head", "neuron"))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    patterns = {"include": [*heads, f"{neurons[0]}*", neurons[1]], "ignore": [neurons[1]]}
    config = PruningConfig(granularity="channel", target=0.5, scope="layer", round_to=1, **patterns)
    report = hfprune.prune(model, config, example_inputs=inputs)
    assert set(report.groups) == {*heads, neurons[0]}
    assert all(after == before // 2 for before, after in report.groups.values())
    cut = {name for name, tensor in model.state_dict().items() if tensor.shape != shapes[name]}
    assert cut == {member.tensor for name in report.groups for member in groups[name].members}


def test_ratios_of_their_own():
    model, inputs, _ = made("cnn")
    config = PruningConfig(granularity="channel", target=0.5, scope="layer", round_to=1, per_layer={"conv1": 0.25})
    report = hfprune.prune(model, config, example_inputs=inputs)
    assert list(report.groups.values()) == [(8, 6), (12, 6)]

    model, inputs, _ = made("cnn")
    config = PruningConfig(granularity="channel", target=0.45, scope="global", round_to=1, per_layer=[0.0, 0.75])
    report = hfprune.prune(model, config, example_inputs=inputs)
    assert list(report.groups.values()) == [(8, 8), (12, 3)]


@pytest.mark.parametrize("kind", ["constant", "geometric"])
def test_several_steps_come_to_the_same_size(kind):
    model, inputs, _ = made("vit")
    schedule = {"kind": kind, "steps": 3}
    config = PruningConfig(granularity="channel", target=0.5, scope="layer", schedule=schedule, round_to=1)
    report = hfprune.prune(model, config, example_inputs=inputs)
    assert all(abs(after - before / 2) <= 0.5 for before, after in report.groups.values())
    assert report.achieved == pytest.approx(report.pruned / report.units)


@pytest.mark.parametrize(("reduction", "normalize"), [("mean", "max"), ("sum", "none"), ("max", "mean")])
def test_reductions_and_normalizations_reach_the_target(reduction, normalize):
    model, inputs, _ = made("cnn")
    options = {"reduction": reduction, "normalize": normalize, "round_to": 1}
    report = hfprune.prune(model, PruningConfig(granularity="channel", target=0.5, **options), example_inputs=inputs)
    assert report.pruned == 10


def test_absolute_targets():
    model, inputs, _ = made("timm_resnet")
    dense = sizes(model, inputs)["params"]
    target = {"params": str(dense // 2)}
    config = PruningConfig(granularity="channel", target=target, round_to=1)
    report = hfprune.prune(model, config, example_inputs=inputs)
    assert sizes(model, inputs)["params"] == pytest.approx(dense // 2, rel=0.02)
    assert not report.note


class AroundAnLSTM(nn.Module):
    """Linear layers around a recurrent one, whose multiplications count though nothing in it can be cut."""

    def __init__(self):
        super().__init__()
        self.first, self.wide, self.last = nn.Linear(6, 16), nn.Linear(16, 64), nn.Linear(64, 4)
        self.state = nn.LSTM(16, 8, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x):
        return self.last(self.wide(self.state(self.first(x))[0]).relu())


def test_recurrent_layers_count():
    model, inputs = AroundAnLSTM().eval(), (torch.randn(1, 5, 6),)
    dense = hfprune.measure(model, inputs).macs
    assert analyse(model, inputs).costs.macs() == dense
    config = PruningConfig(granularity="channel", target={"macs": 0.9}, round_to=1)
    hfprune.prune(model, config, example_inputs=inputs)
    assert hfprune.measure(model, inputs).macs == pytest.approx(0.9 * dense, rel=0.02)
