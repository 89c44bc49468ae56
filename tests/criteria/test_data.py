"""The forms that calibration data may take, and what is left untouched by it."""

from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hfprune
from hfprune import PruningConfig
from hfprune.criteria import create, criteria
from hfprune.criteria.calibration import batches_of, default_loss, gather, loss_from, to_device
from hfprune.errors import ConfigError, DataError, ModelError
from hfprune.weights import prunable_weights
from tests.support.models import CNN, MLP, TINY, bert, images, same, snapshot, texts, vectors

TAYLOR = PruningConfig(criterion="taylor", target=0.5)


def masks(model, data, config=TAYLOR, **options):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    digest = hfprune.prune(model, config, data, **options).masks.digest()
    model.load_state_dict(state)
    return digest


def refusal(model, data, kind, config=TAYLOR, **options):
    before = snapshot(model)
    with pytest.raises(kind) as error:
        hfprune.prune(model, config, data, **options)
    assert same(before, snapshot(model))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_one_pair_many_pairs_generators_and_loaders_agree():
    model = MLP()
    inputs, labels = vectors(8)
    pair = (inputs, labels)
    assert masks(model, pair) == masks(model, [pair]) == masks(model, (b for b in [pair]))
    halves = [(inputs[:4], labels[:4]), (inputs[4:], labels[4:])]
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=4)
    assert masks(model, halves) == masks(model, tuple(halves)) == masks(model, loader) == masks(model, iter(loader))


def test_maps_go_to_the_model_whole():
    model, batch = bert(), texts()
    assert masks(model, batch) == masks(model, [batch]) == masks(model, UserDict(batch))
    inputs = {"input_ids": batch["input_ids"]}
    assert masks(model, (inputs, batch["labels"])) == masks(model, batch)


def test_a_tensor_alone_needs_a_loss():
    model, inputs = MLP(), vectors()[0]
    assert "no loss can be computed; give pairs (inputs, labels)" in refusal(model, inputs, DataError)
    assert masks(model, inputs, loss=lambda m, x: m(x).square().mean())


def test_steps_share_the_batches_of_a_generator():
    model = MLP()
    config = PruningConfig(criterion="taylor", target=0.5, schedule={"kind": "constant", "steps": 3})
    pairs = [vectors(4, seed=seed) for seed in range(3)]
    assert masks(model, iter(pairs), config) == masks(model, pairs, config)


def test_an_endless_generator_ends_after_the_batches_asked_for():
    model, drawn = MLP(), []

    def endless():
        for seed in range(1000):
            drawn.append(seed)
            yield vectors(4, seed=seed)

    config = PruningConfig(
        criterion={"name": "taylor", "batches": 2}, target=0.5, schedule={"kind": "constant", "steps": 3}
    )
    hfprune.prune(model, config, endless())
    assert drawn == [0, 1]


@pytest.mark.parametrize("training", [True, False])
def test_statistics_dropout_and_modes_are_untouched(training):
    model = MLP().train(training)
    model.norm.eval()
    model.first.weight.requires_grad_(False)
    model.last.weight.grad = torch.ones_like(model.last.weight)
    generator = torch.get_rng_state()
    before = snapshot(model)
    hfprune.prune(model, PruningConfig(criterion="taylor", target=0.0), vectors())
    assert same(before, snapshot(model))
    assert torch.equal(generator, torch.get_rng_state())


def test_gradients_flow_where_the_caller_switched_them_off():
    model = CNN()
    with torch.no_grad():
        found = masks(model, images())
    assert found == masks(model, images())


@pytest.mark.parametrize("criterion", ["snip", "fisher", "obd", "synflow", "wanda"])
def test_a_weight_that_takes_no_part_is_refused_and_may_be_ignored(criterion):
    model = MLP()
    model.unused = nn.Linear(8, 8)
    config = PruningConfig(criterion=criterion, target=0.5)
    message = refusal(model, vectors(), ModelError, config)
    assert message.startswith(f"pruning.criterion: '{criterion}' can't score 'unused.weight': it took no part in any")
    config = PruningConfig(criterion=criterion, target=0.5, ignore=["unused"])
    assert hfprune.prune(model, config, vectors()).pruned == 72
    assert model.unused.weight.all()


def test_layers_that_scores_tell_nothing_about_are_named():
    model = MLP()
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.fill_(-1.0)  # nothing gets through the ReLU
    with pytest.warns(UserWarning, match=r"'snip' tells nothing apart in 'first.weight' \(and 1 more\)"):
        hfprune.prune(model, PruningConfig(criterion="snip", target=0.7), vectors())
    assert model.first.weight.any()
    assert model.last.weight.any()


def test_a_layer_that_goes_as_a_whole_is_named():
    model = MLP()
    with torch.no_grad():
        model.first.weight *= 1e-3
    with pytest.warns(UserWarning, match="'l1' removes all of 'first.weight'; min_kept keeps a part of every layer"):
        hfprune.prune(model, PruningConfig(criterion="l1", target=0.7))


@pytest.mark.parametrize("criterion", ["l1", "l2", "lamp", "taylor", "fisher", "obd", "wanda"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_weights_that_are_not_finite(criterion, value, granularity):
    model = MLP()
    with torch.no_grad():
        model.last.weight[0, 0] = value
    config = PruningConfig(criterion=criterion, granularity=granularity, target=0.5)
    message = refusal(model, vectors(), ModelError, config)
    assert criterion in message or message.startswith("the loss on calibration batch 1 is nan")


def test_missing_data():
    assert refusal(MLP(), None, ConfigError) == (
        "pruning.criterion: 'taylor' scores by gradients and needs data; give data, or use 'l1'"
    )
    assert refusal(MLP(), [], DataError) == "pruning.criterion: 'taylor': the calibration data holds no batch"
    assert refusal(MLP(), 3, DataError) == "data: expected a batch or an iterable of batches, not int"


def test_a_loss_that_is_not_a_number():
    model = MLP()
    inputs, labels = vectors()
    bad = inputs.clone()
    bad[0, 0] = torch.nan
    message = refusal(model, [(inputs, labels), (bad, labels)], ModelError)
    assert message == "pruning.criterion: 'taylor': the loss on calibration batch 2 is nan; nothing was pruned"


@pytest.mark.parametrize(
    "data",
    [
        (torch.randn(4, 3), torch.zeros(4, dtype=torch.long)),
        (torch.randn(4, 8), torch.full((4,), 99)),
        (torch.randn(4, 8), torch.zeros(3, dtype=torch.long)),
        {"nothing": torch.randn(4, 8), "labels": torch.zeros(4, dtype=torch.long)},
    ],
    ids=["width", "class", "count", "name"],
)
def test_batches_that_do_not_fit(data):
    assert refusal(MLP(), data, ModelError).startswith("pruning.criterion: 'taylor': the model can't take the batch: ")


def test_token_ids_beyond_the_vocabulary():
    batch = texts()
    batch["input_ids"] = batch["input_ids"] + 1000
    assert refusal(bert(), batch, ModelError).startswith(
        "pruning.criterion: 'taylor': the model can't take the batch: "
    )


def test_a_loss_that_depends_on_nothing():
    message = refusal(MLP(), vectors(), ModelError, loss=lambda model, batch: torch.tensor(1.0))
    assert message.startswith("pruning.criterion: 'taylor': the loss on calibration batch 1 ")


def test_a_loss_that_is_no_scalar():
    message = refusal(MLP(), vectors(), ModelError, loss=lambda model, batch: model(batch[0]))
    assert message.startswith("pruning.criterion: 'taylor': the loss on calibration batch 1 ")


def test_default_losses():
    logits, classes = torch.randn(6, 4), torch.randint(4, (6,))
    assert loss_from(logits, classes) == nn.functional.cross_entropy(logits, classes)
    assert loss_from({"logits": logits}, classes) == nn.functional.cross_entropy(logits, classes)
    assert loss_from((logits, 3), classes) == nn.functional.cross_entropy(logits, classes)
    values = torch.randn(6)
    assert loss_from(values[:, None], torch.zeros(6)) == pytest.approx(float(values.square().mean()))
    sequence = torch.randn(2, 5, 4)
    labels = torch.randint(4, (2, 5))
    expected = nn.functional.cross_entropy(sequence.reshape(10, 4), labels.reshape(10))
    assert loss_from(sequence, labels) == expected
    maps = torch.randn(2, 4, 5, 6)
    labels = torch.randint(4, (2, 5, 6))
    assert loss_from(maps, labels) == nn.functional.cross_entropy(maps, labels)


def test_a_models_own_loss_comes_first():
    model, batch = bert(), texts()
    assert default_loss(model, batch) == model(**batch).loss


def test_batches_and_devices():
    pair = vectors()
    assert list(batches_of(pair)) == [pair]
    assert list(batches_of([pair, pair])) == [pair, pair]
    named = namedtuple("Batch", "inputs labels")(*pair)
    moved = to_device([named, {"a": pair[0]}, "text"], torch.device("cpu"))
    assert type(moved[0]) is type(named)
    assert moved[2] == "text"
    assert moved[1]["a"] is pair[0]


@pytest.mark.parametrize("criterion", sorted(name for name in criteria if criteria[name].statistics))
def test_half_precision_statistics_are_kept_in_single(criterion):
    model = CNN().bfloat16().eval()
    batch = (images()[0].bfloat16(), images()[1])
    weights = {name: w for name, w in prunable_weights(model).items() if name != "conv1.weight"}
    found = gather(create(criterion), model, weights, batch, example_inputs=((batch[0][:1],), {}))
    assert {value.dtype for (value,) in found.values()} <= {torch.float32, torch.float64}
    assert all(value.isfinite().all() for (value,) in found.values())
    granularity = "channel" if criteria[criterion].of_units else "weight"
    granularity = "rank" if criteria[criterion].of_components else granularity
    report = hfprune.prune(model, PruningConfig(criterion=criterion, granularity=granularity, target=0.5), batch)
    assert report.pruned
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("criterion", ["fisher", "obd", "wanda", "apoz", "entropy", "block_influence"])
def test_criteria_that_need_data_say_so(criterion):
    tiny = TINY["vit"] if criterion == "block_influence" else TINY["cnn"]
    granularity = {"block_influence": "layer", "apoz": "channel", "entropy": "channel"}.get(criterion, "weight")
    config = PruningConfig(criterion=criterion, granularity=granularity, target=0.5)
    example = images()[0] if granularity == "channel" else None
    message = refusal(tiny.build(), None, ConfigError, config, example_inputs=example)
    assert message.startswith(f"pruning.criterion: '{criterion}' ")
    assert "needs data" in message


def test_synflow_needs_inputs_but_no_data():
    model = CNN()
    config = PruningConfig(criterion="synflow", target=0.5)
    assert "example_inputs: missing" in refusal(model, None, ModelError, config)
    first = masks(model, None, config, example_inputs=images()[0])
    assert first == masks(model, images(seed=5), config)
    assert "can't run on inputs of ones" in refusal(model, None, ModelError, config, example_inputs=torch.ones(2, 5))


def test_activations_need_no_labels_and_progress_is_shown():
    shown = []

    def progress(batches, words):
        for batch in batches:
            shown.append(words)
            yield batch

    config = PruningConfig(criterion="apoz", granularity="channel", target=0.5, round_to=1)
    batches = [images(seed=seed)[0] for seed in range(3)]
    assert hfprune.prune(CNN(), config, batches, progress=progress).pruned == 10
    assert shown == ["activations"] * 3


def test_a_unit_whose_consumer_never_runs():
    class Skipping(MLP):
        def forward(self, x):
            y = self.norm(self.first(x)).relu()
            return self.last(y) if self.training or x.shape[0] == 1 else y[:, :4] + 0 * self.last.weight.sum()

    config = PruningConfig(criterion="apoz", granularity="channel", target=0.5, round_to=1)
    message = refusal(Skipping().eval(), vectors(4)[0], ModelError, config, example_inputs=vectors(1)[0])
    assert message.startswith("pruning.criterion: 'apoz' can't score 'first': none of its layers took part in any")


def test_units_that_scores_tell_nothing_about_are_named():
    config = PruningConfig(criterion="bn_scale", granularity="channel", target=0.5, round_to=1)
    with pytest.warns(UserWarning, match="'bn_scale' tells nothing apart in 'conv1' .*, whose scores are all equal"):
        hfprune.prune(CNN(), config, example_inputs=images()[0])
