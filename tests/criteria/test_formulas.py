"""Data-driven, geometric and structural scores against plain loops in double precision."""

import itertools
import math

import pytest
import torch
from torch import nn

import hfprune
from hfprune import PruningConfig
from hfprune.criteria import create
from hfprune.criteria.calibration import gather
from hfprune.criteria.calibration.second import signs
from hfprune.criteria.geometry import geometric_median
from hfprune.pruner import Pruner
from hfprune.structure.blocks import find_blocks, score_blocks
from hfprune.structure.groups import analyse
from hfprune.structure.scores import score_groups, scored_weights
from hfprune.weights import prunable_weights
from tests.support import references
from tests.support.models import CLASSES, CNN, MLP, TINY, Convolutions, bert, gpt2, images, texts, tokens, vectors


class Small(nn.Module):
    """Every kind of convolution, so small that plain loops go over every weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.wide = nn.Conv2d(6, 4, (1, 3), padding="same", dilation=(1, 2))
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.line = nn.Conv1d(6, 3, 2, padding=1, padding_mode="circular")
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = self.up(self.wide(x).relu()).relu()
        return self.head(self.line(x.flatten(2)).relu().mean(2))


def small_batches(model, count=2):
    if isinstance(model, MLP):
        made = [vectors(5, seed=seed) for seed in range(count)]
    else:
        channels = next(p for p in model.parameters()).shape[1] * getattr(next(model.children()), "groups", 1)
        made = [images(3, size=6, seed=seed, channels=channels) for seed in range(count)]
    return [(inputs.double(), labels) for inputs, labels in made]


def used(model):
    """A model in double precision whose norms have seen something."""
    model = model.double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
                module.weight.normal_()
                module.bias.normal_()
    return model.eval()


def close(scores, expected, floor=1e-9):
    scores, expected = scores.double(), torch.as_tensor(expected, dtype=torch.float64)
    assert scores.shape == expected.shape
    scale = expected.abs().clamp(min=float(expected.abs().max()) * floor + 1e-300)
    assert float(((scores - expected).abs() / scale).max()) < 1e-5


def terms(model, name, data):
    """What a criterion gives for single weights, by weight."""
    criterion = create(name) if isinstance(name, str) else name
    weights = prunable_weights(model)
    example = ((data[0][0][:1],), {})
    found = gather(criterion, model, weights, data, loss=references.loss_of, example_inputs=example)
    return {key: criterion.terms(key, weights[key].parameter.detach(), *found[key]) for key in weights}


@pytest.mark.parametrize("build", [MLP, CNN, Small])
def test_fisher(build):
    model = used(build())
    data = small_batches(model)
    squares = references.squared_gradients(model, data)
    for key, scores in terms(model, "fisher", data).items():
        weight = model.get_parameter(key).detach()
        close(scores, 0.5 * weight * weight * squares[key])


def test_fisher_is_not_the_square_of_the_mean():
    model = used(MLP())
    (batch,) = small_batches(model, 1)
    apart = terms(model, "fisher", [batch])["first.weight"]
    squared = terms(model, "snip", [batch])["first.weight"].square() / 2
    assert float(apart.sum() / squared.sum()) > 1.5


def test_fisher_one_sample_at_a_time_where_a_model_looks_at_values():
    class Looking(MLP):
        def forward(self, x):
            return super().forward(x if float(x.sum()) > -1e9 else -x)

    torch.manual_seed(0)
    looking, plain = used(Looking()), used(MLP())
    plain.load_state_dict(looking.state_dict())
    data = small_batches(plain)
    one, many = terms(looking, "fisher", data), terms(plain, "fisher", data)
    for key in one:
        close(one[key], many[key])


def test_fisher_where_weights_are_kept_in_places_of_their_own():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(8, 3, batch_first=True)

        def forward(self, x):
            return self.lstm(x[:, None])[0][:, -1]

    model = Recurrent().double().eval()
    data = [(inputs.double(), labels % 3) for inputs, labels in (vectors(6),)]
    squares = references.squared_gradients(model, data)
    for key, scores in terms(model, "fisher", data).items():
        close(scores, 0.5 * model.get_parameter(key).detach().square() * squares[key])


@pytest.mark.parametrize("build, batch", [(bert, texts), (gpt2, tokens)])
def test_fisher_of_transformers(build, batch):
    model, batch = build().double(), batch()
    weights = prunable_weights(model)
    found = gather(create("fisher"), model, weights, batch)
    ones = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(3)]
    expected = {name: torch.zeros_like(w.parameter) for name, w in weights.items()}
    for one in ones:
        slopes = torch.autograd.grad(model(**one).loss, [w.parameter for w in weights.values()])
        for name, slope in zip(weights, slopes, strict=True):
            expected[name] += slope.square() / 3
    for name in weights:
        close(found[name][0], expected[name])


def test_obd_where_the_hessian_is_diagonal():
    model = nn.Linear(3, 2).double()
    factors = torch.rand(2, 3, dtype=torch.float64)
    criterion = create("obd", {"probes": 1})
    weights = prunable_weights(model)
    loss = lambda m, batch: (factors * m.weight**4).sum() / 12  # noqa: E731
    (found,) = gather(criterion, model, weights, [torch.ones(1)], loss=loss)["weight"]
    close(found, factors * model.weight.detach().square())
    close(criterion.terms("weight", model.weight.detach(), found), 0.5 * factors * model.weight.detach() ** 4)


@pytest.mark.parametrize("build", [MLP, Small])
def test_obd_with_the_same_probes(build):
    model = used(build())
    data = small_batches(model)
    weights = prunable_weights(model)
    names = list(weights)
    found = gather(create("obd", {"probes": 3}, seed=5), model, weights, data, loss=references.loss_of)
    generator = torch.Generator().manual_seed(5)
    total = 0.0
    for batch in data:
        matrix = references.hessian(model, [batch], names)
        for _ in range(3):
            v = torch.cat([signs(w.parameter.shape, generator, w.parameter).flatten() for w in weights.values()])
            total = total + v * (matrix @ v) / 3 / len(data)
    close(torch.cat([found[name][0].flatten() for name in names]), total)


def test_obd_tends_to_the_diagonal():
    model = used(MLP(4))
    data = small_batches(model, 1)
    weights = prunable_weights(model)
    diagonal = references.hessian(model, data, list(weights)).diagonal()
    found = gather(create("obd", {"probes": 2000}), model, weights, data, loss=references.loss_of)
    found = torch.cat([found[name][0].flatten() for name in weights])
    assert float((found - diagonal).norm() / diagonal.norm()) < 0.2


@pytest.mark.parametrize("build, shape", [(MLP, (1, 8)), (CNN, (1, 3, 6, 6)), (Small, (1, 4, 6, 6))])
def test_synflow(build, shape):
    model = used(build())
    expected = references.synaptic_flow(model, shape)
    for key, scores in terms(model.float(), "synflow", [(torch.zeros(shape), None)]).items():
        assert scores.dtype == torch.float64
        close(scores, expected[key])


def test_synflow_is_kept_from_layer_to_layer():
    """What flows into a layer flows out of it (Tanaka 2020, theorem 2): without biases all layers sum up alike."""
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) if i % 2 == 0 else nn.ReLU() for i in range(5)))
    scores = terms(model, "synflow", [(torch.zeros(1, 8), None)])
    close(torch.stack([value.sum() for value in scores.values()]), [float(scores["0.weight"].sum())] * 3)


def test_synflow_does_not_overflow_and_leaves_the_model_alone():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(60)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 10
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = terms(model, "synflow", [(torch.zeros(1, 64), None)])
    assert max(float(value.max()) for value in scores.values()) > torch.finfo(torch.float32).max
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    report = hfprune.prune(
        model, PruningConfig(criterion="synflow", target=0.9, schedule={"kind": "geometric", "steps": 5}),
        example_inputs=torch.zeros(1, 64),
    )  # fmt: skip
    assert report.masks.zeros == round(0.9 * report.units)
    assert all(layer.weight.any() for layer in model)  # iterative: no layer is emptied


def test_synflow_of_tokens_is_of_the_whole_table():
    model = gpt2()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    config = PruningConfig(criterion="synflow", target=0.5)
    first = hfprune.prune(model, config, example_inputs={"input_ids": torch.tensor([[1, 2, 3]])}).masks.digest()
    model.load_state_dict(state)
    second = hfprune.prune(model, config, example_inputs={"input_ids": torch.tensor([[7, 8, 9]])}).masks.digest()
    assert first == second


@pytest.mark.parametrize("build", [MLP, Small])
def test_wanda(build):
    model = used(build())
    data = small_batches(model)
    for key, scores in terms(model, "wanda", data).items():
        path = key.removesuffix(".weight")
        layer = model.get_submodule(path)
        if isinstance(layer, nn.Conv1d):  # circular padding is what the layer adds to its input
            continue
        close(scores, references.wanda(layer, references.inputs_of(model, path, data)))


def test_wanda_with_circular_padding_and_grouped_transposed_convolutions():
    model = used(Convolutions())
    data = [(inputs.double(), labels) for inputs, labels in (images(1, size=6, channels=8),)]
    scores = terms(model, "wanda", data)
    layer = model.both
    close(scores["both.weight"], references.wanda(layer, references.inputs_of(model, "both", data)))
    model = used(Small())
    data = small_batches(model, 1)
    inputs = references.inputs_of(model, "line", data)
    padded = [nn.functional.pad(value, (1, 1), mode="circular") for value in inputs]
    plain = nn.Conv1d(6, 3, 2).double()
    plain.weight = model.line.weight
    close(terms(model, "wanda", data)["line.weight"], references.wanda(plain, padded))


def test_wanda_takes_the_same_number_of_every_row():
    model = used(MLP())
    data = small_batches(model)
    expected = terms(model, "wanda", data)
    masks = hfprune.prune(model, PruningConfig(criterion="wanda", target=0.4), data).masks
    assert masks.zeros == round(0.4 * 144)
    for key, kept in masks.kept.items():
        gone = (~kept).sum(1)
        assert abs(int(gone.sum()) - 0.4 * kept.numel()) < 1
        assert int(gone.max()) - int(gone.min()) <= 1
        for scores, row in zip(expected[key], kept, strict=True):
            assert float(scores[~row].max()) <= float(scores[row].min())


def test_wanda_by_row_along_a_schedule_and_with_ratios_of_single_layers():
    model = used(CNN())
    config = PruningConfig(
        criterion="wanda", target=0.7, per_layer={"head": 0.25}, schedule={"kind": "geometric", "steps": 3}
    )
    report = hfprune.prune(model, config, small_batches(model))
    sizes = {"conv1.weight": 216, "conv2.weight": 864}
    for key, kept in report.masks.kept.items():
        gone = (~kept).flatten(1).sum(1)
        assert int(gone.max()) - int(gone.min()) <= 1
        wanted = 0.7 * sizes[key] if key in sizes else 12
        assert abs(int(gone.sum()) - wanted) < 1
    assert report.masks.zeros == round(0.7 * 1080) + 12


@pytest.mark.parametrize("name", ["apoz", "mean_activation", "entropy"])
@pytest.mark.parametrize("build, path", [(MLP, "last"), (CNN, "conv2"), (Small, "up"), (Small, "wide")])
def test_activations(name, build, path):
    model = used(build())
    data = small_batches(model)
    layer = model.get_submodule(path)
    weights = {key: w for key, w in prunable_weights(model).items() if key == f"{path}.weight"}
    (found,) = gather(create(name), model, weights, data)[f"{path}.weight"]
    values = references.by_channel(layer, references.inputs_of(model, path, data))
    expected = [references.channel_scores(name, channel) for channel in values]
    dim = 0 if getattr(layer, "transposed", False) else 1
    close(found.movedim(dim, 0).flatten(), expected)


def test_an_activation_that_never_varies():
    model = used(MLP())
    with torch.no_grad():
        model.norm.weight[3], model.norm.bias[3] = 0.0, -1.0
    data = small_batches(model)
    for name in ("apoz", "mean_activation", "entropy"):
        (found,) = gather(create(name), model, prunable_weights(model, ["last"]), data)["last.weight"]
        assert float(found[0, 3]) == 0
        assert int((found > 0).sum()) > 6


def test_statistics_of_grouped_convolutions_fit_their_weights():
    model = used(Small())
    data = small_batches(model)
    weights = prunable_weights(model)
    inputs = references.inputs_of(model, "first", data)
    channels = references.by_channel(model.first, inputs)
    (found,) = gather(create("mean_activation"), model, weights, data)["first.weight"]
    for out, channel in itertools.product(range(6), range(2)):
        values = channels[out // 3 * 2 + channel]
        assert float(found[out, channel]) == pytest.approx(references.channel_scores("mean_activation", values))


# ---- whole units of coupled groups ----------------------------------------------------------------------------------

ELEMENTS = {
    "l1": lambda w, s: math.fsum(abs(a) for a in w),
    "l2": lambda w, s: math.sqrt(math.fsum(a * a for a in w)),
    "snip": lambda w, s: math.fsum(abs(a * b) for a, b in zip(w, s, strict=True)),
    "taylor": lambda w, s: math.fsum(a * b for a, b in zip(w, s, strict=True)) ** 2,
    "fisher": lambda w, s: math.fsum(a * a * b / 2 for a, b in zip(w, s, strict=True)),
    "wanda": lambda w, s: math.fsum(abs(a) * b for a, b in zip(w, s, strict=True)),
    "synflow": lambda w, s: math.fsum(abs(a * b) for a, b in zip(w, s, strict=True)),
    "bn_scale": lambda w, s: math.fsum(abs(a) for a in w),
}


def lamp(rows):
    squares = [math.fsum(a * a for a in row) for row in rows]
    return [square / math.fsum(other for other in squares if other >= square) for square in squares]


BY_UNITS = {"lamp": lamp, "fpgm": references.distances, "fermat": references.median_distances}
GROUPS = [(MLP, "first", "last"), (CNN, "conv1", "conv2"), (CNN, "conv2", "head")]


def grouped(model, name, data, path):
    criterion = create(name)
    structure = analyse(model, (data[0][0],))
    group = structure.groups[path]
    weights = scored_weights(model, [group], criterion)
    example = ((data[0][0][:1],), {})
    found = gather(criterion, model, weights, data, loss=references.loss_of, example_inputs=example)
    return group, found, score_groups(model, [group], criterion, found)[path]


@pytest.mark.parametrize("name", [*ELEMENTS, *BY_UNITS])
@pytest.mark.parametrize("build, path, consumer", GROUPS)
def test_coupled_groups(build, path, consumer, name):
    model = used(build())
    group, found, scores = grouped(model, name, small_batches(model), path)
    norm = {"first": "norm", "conv1": "norm1", "conv2": "norm2"}[path]
    members = [(f"{norm}.weight", 0)] if name == "bn_scale" else [(f"{path}.weight", 0), (f"{consumer}.weight", 1)]
    assert set(found) == {tensor for tensor, _ in members}
    units = torch.arange(group.units)[:, None]
    parts = []
    for tensor, dim in members:
        weight = model.get_parameter(tensor).detach()
        rows = references.unit_rows(weight, dim, units)
        if name in BY_UNITS:
            parts.append(BY_UNITS[name](rows))
            continue
        statistic = found[tensor][0].expand(weight.shape) if found[tensor] else weight
        others = references.unit_rows(statistic, dim, units)
        parts.append([ELEMENTS[name](row, other) for row, other in zip(rows, others, strict=True)])
    close(scores, references.of_group(parts))


@pytest.mark.parametrize("name", ["apoz", "mean_activation", "entropy"])
@pytest.mark.parametrize("build, path, consumer", GROUPS)
def test_activations_of_coupled_groups(build, path, consumer, name):
    model = used(build())
    data = small_batches(model)
    _, found, scores = grouped(model, name, data, path)
    assert set(found) == {f"{consumer}.weight"}
    values = references.by_channel(model.get_submodule(consumer), references.inputs_of(model, consumer, data))
    close(scores, references.of_group([[references.channel_scores(name, channel) for channel in values]]))


def test_random_units_are_uniform():
    model = MLP(4000)
    (group,) = analyse(model, vectors()[:1]).groups.values()
    scores = score_groups(model, [group], create("random", seed=3), {}, normalize="none")[group.name]
    assert torch.equal(scores, score_groups(model, [group], create("random", seed=3), {}, normalize="none")[group.name])
    assert torch.histc(scores, 10, 0, 1).tolist() == pytest.approx([400] * 10, rel=0.2)


def test_the_geometric_median_of_points_that_hold_it():
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    assert torch.allclose(geometric_median(points), torch.zeros(2, dtype=torch.float64), atol=1e-9)
    assert torch.equal(geometric_median(torch.ones(4, 3)), torch.ones(3))
    line = torch.tensor([[0.0], [1.0], [10.0]], dtype=torch.float64)
    assert float(geometric_median(line)) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 600])
def test_fpgm_in_blocks(count):
    points = torch.randn(count, 5, dtype=torch.float64)
    expected = torch.stack([(points - point).norm(dim=1).sum() for point in points])
    close(create("fpgm").units("w", points), expected)


def test_fpgm_of_units_far_from_the_origin():
    points = torch.randn(20, 30) * 1e-3 + 1.0
    expected = references.distances(points.double().tolist())
    found = create("fpgm").units("w", points).double()
    assert float((found / torch.tensor(expected) - 1).abs().max()) < 1e-3


def test_unscored_statistics_are_not_computed_for_other_layers():
    model = used(MLP())
    pruner = Pruner(model, PruningConfig(criterion="wanda", target=0.5, ignore=["first"]))
    found = gather(pruner.criterion, model, pruner.weights, small_batches(model))
    assert list(found) == ["last.weight"]


def test_block_influence():
    model = TINY["vit"].build().double().eval()
    batches = [{k: v.double() if v.is_floating_point() else v for k, v in TINY["vit"].batch().items()} for _ in "ab"]
    hidden = []
    with torch.no_grad():
        for batch in batches:
            hidden.append(model(batch["pixel_values"], output_hidden_states=True).hidden_states)
    expected = []
    for number in range(model.config.num_hidden_layers):
        values = []
        for states in hidden:
            before, after = states[number].flatten(0, 1), states[number + 1].flatten(0, 1)
            for x, y in zip(before.tolist(), after.tolist(), strict=True):
                product = sum(a * b for a, b in zip(x, y, strict=True))
                sizes = math.sqrt(sum(a * a for a in x)) * math.sqrt(sum(b * b for b in y))
                values.append(1 - product / sizes)
        expected.append(sum(values) / len(values))
    structure = analyse(model, {"pixel_values": batches[0]["pixel_values"]})
    scores = score_blocks(structure, find_blocks(structure), create("block_influence"), {}, batches)
    assert scores == pytest.approx(expected, rel=1e-5)
