"""wanda and sparsegpt: against plain references, what they see, exact counts, and what stays as it was."""

import copy

import pytest
import torch
from torch import nn

import hfprune
from hfprune import PruningConfig
from hfprune.criteria.layers import layers_of
from hfprune.criteria.layerwise import shares
from hfprune.errors import ConfigError, DataError, ModelError
from hfprune.selection import select_rows
from hfprune.weights import prunable_weights
from tests.support.models import CNN, MLP, TINY, bert, gpt2, images, llama, same, snapshot, texts, tokens, vectors

BOTH = pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])


def correlated(rows=400, width=24, seed=0, rank=6):
    """Inputs of which a few directions explain most, each feature of a size of its own."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, rank, generator=g) @ torch.randn(rank, width, generator=g)
    sizes = torch.logspace(-1, 1, width)[torch.randperm(width, generator=g)]
    return (mixed + 0.1 * torch.randn(rows, width, generator=g)) * sizes


def linear(outputs=10, width=24, dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(width, outputs, bias=False)).to(dtype)


def pruned(model, data, criterion, ratio=0.5, granularity="weight", **options):
    model = copy.deepcopy(model)
    return model, hfprune.prune(
        model, PruningConfig(criterion=criterion, target=ratio, granularity=granularity, **options), data
    )


# ---- sparsegpt against the definition ------------------------------------------------------------------------------


def surgeon(weight, inputs, total, block, damping=0.01, pattern=None):
    """Optimal Brain Surgeon a column at a time, with the inverse Hessian of what is left inverted anew each time."""
    weight = weight.clone()
    rows, columns = weight.shape
    hessian = inputs.T @ inputs
    hessian += damping * hessian.diagonal().mean() * torch.eye(columns, dtype=hessian.dtype)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    gone = torch.zeros(rows, columns, dtype=torch.bool)

    def lowest(start, stop, count, among):
        cost = {(r, c): float(weight[r, c] ** 2 / inverses[c][0, 0]) for r in among for c in range(start, stop)}
        for place in sorted(cost, key=cost.get)[:count]:
            gone[place] = True

    for start in range(0, columns, block):
        stop = min(start + block, columns)
        if pattern is None:
            lowest(start, stop, round(total * stop / columns) - int(gone.sum()), range(rows))
        for column in range(start, stop):
            if pattern and column % pattern[1] == 0:
                for row in range(rows):
                    lowest(column, column + pattern[1], pattern[1] - pattern[0], [row])
            inverse = inverses[column]
            for row in range(rows):
                if gone[row, column]:
                    weight[row, column:] -= weight[row, column] / inverse[0, 0] * inverse[0]
                    weight[row, column] = 0.0
    return weight, gone


@pytest.mark.parametrize(("block", "ratio"), [(128, 0.5), (8, 0.5), (7, 0.3), (1, 0.9)])
def test_sparsegpt_is_optimal_brain_surgeon(block, ratio):
    model, inputs = linear(), correlated().double()
    total = round(ratio * 240)
    expected, gone = surgeon(model[0].weight.detach(), inputs, total, block)
    after, report = pruned(model, inputs, {"name": "sparsegpt", "block_size": block}, ratio)
    assert report.masks.zeros == total
    assert torch.equal(~report.masks.kept["0.weight"], gone)
    assert torch.allclose(after[0].weight, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("block", [128, 8, 6])
def test_sparsegpt_with_a_pattern(block):
    model, inputs = linear(), correlated().double()
    expected, gone = surgeon(model[0].weight.detach(), inputs, 0, 24, pattern=(2, 4))
    after, report = pruned(model, inputs, {"name": "sparsegpt", "block_size": block}, granularity="2:4")
    assert torch.equal(~report.masks.kept["0.weight"], gone)
    assert torch.allclose(after[0].weight, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("granularity", "ratio"), [("weight", 0.5), ("weight", 0.7), ("2:4", 0.5)])
def test_the_error_of_a_layer_is_least_with_sparsegpt_and_larger_with_magnitude(granularity, ratio):
    model, inputs = linear(64, 96, torch.float32), correlated(2000, 96, rank=20)
    wanted = model(inputs).detach()
    errors = {}
    for criterion in ("sparsegpt", "wanda", "l1"):
        after, report = pruned(model, inputs, criterion, ratio, granularity)
        assert report.masks.zeros == round(ratio * 64 * 96)
        errors[criterion] = float((after(inputs) - wanted).detach().square().mean())
    assert errors["sparsegpt"] < errors["wanda"] < errors["l1"]


def test_more_damping_where_the_hessian_is_singular():
    model, inputs = linear(dtype=torch.float32), correlated(3)
    inputs[:, 6] = inputs[:, 7]
    after, report = pruned(model, inputs, {"name": "sparsegpt", "damping": 1e-12}, 50 / 240)
    assert report.masks.zeros == 50
    assert torch.allclose(after(inputs), model(inputs), atol=1e-2)


def test_what_meets_only_zeros_goes_first():
    model, inputs = linear(dtype=torch.float32), correlated()
    inputs[:, :5] = 0.0
    after, report = pruned(model, inputs, "sparsegpt", 50 / 240)
    assert not report.masks.kept["0.weight"][:, :5].any()
    assert torch.allclose(after(inputs), model(inputs), atol=1e-4)


def test_half_precision_is_summed_up_in_single():
    model, inputs = linear(64, 96, torch.float32), correlated(2000, 96, rank=20)
    low = copy.deepcopy(model).bfloat16()
    after, report = pruned(low, inputs.bfloat16(), "sparsegpt")
    assert after[0].weight.dtype == torch.bfloat16
    assert report.masks.zeros == 64 * 48
    error = (after.float()(inputs) - model(inputs)).square().mean()
    simple = pruned(model, inputs, "l1")[0]
    assert error < (simple(inputs) - model(inputs)).square().mean()


# ---- wanda against the definition ----------------------------------------------------------------------------------


def test_wanda_takes_the_same_number_from_every_row():
    model, inputs = linear(), correlated().double()
    scores = model[0].weight.detach().abs() * inputs.norm(dim=0)
    after, report = pruned(model, [inputs[:100], inputs[100:]], "wanda")
    kept = report.masks.kept["0.weight"]
    assert (kept.sum(1) == 12).all()
    assert all(scores[row][~kept[row]].max() < scores[row][kept[row]].min() for row in range(10))
    assert torch.equal(after[0].weight[kept], model[0].weight[kept])


def test_wanda_over_a_whole_layer():
    model, inputs = linear(), correlated().double()
    scores = (model[0].weight.detach().abs() * inputs.norm(dim=0)).flatten()
    _, report = pruned(model, inputs, {"name": "wanda", "per_row": False})
    kept = report.masks.kept["0.weight"].flatten()
    assert int(kept.sum()) == 120
    assert scores[~kept].max() < scores[kept].min()


def test_rows_are_filled_as_evenly_as_an_exact_total_and_earlier_steps_allow():
    g = torch.Generator().manual_seed(0)
    for total in (0, 1, 17, 40, 79, 80):
        scores, gone = torch.rand(8, 10, generator=g), torch.zeros(8, 10, dtype=torch.bool)
        gone[0, :7] = total >= 17
        chosen = select_rows(scores, total, gone)
        counts = chosen.sum(1)
        assert int(counts.sum()) == total
        assert not (gone & ~chosen).any()
        assert int(counts[1:].max() - counts[1:].min()) <= 1


def test_shares_add_up():
    assert shares(10, [10, 10], [0, 0], [10, 10]) == [5, 5]
    assert shares(11, [10, 10], [0, 0], [10, 10]) == [6, 5]
    assert shares(15, [10, 10], [0, 0], [3, 10]) == [3, 10]
    assert sum(shares(100, [7, 90, 33, 70], [5, 0, 30, 0], [7, 90, 33, 70])) == 100
    assert shares(0, [3], [0], [3]) == [0]


# ---- layers as matrices --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (2, 4, 7, 7)),
        (nn.Conv2d(4, 6, (1, 3), dilation=2, groups=2, padding="same", bias=False), (2, 4, 7, 7)),
        (nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="circular", bias=False), (2, 4, 7, 7)),
        (nn.Conv1d(4, 6, 3, padding_mode="reflect", padding=1, bias=False), (2, 4, 9)),
        (nn.Conv3d(2, 4, 2, bias=False), (1, 2, 4, 4, 4)),
        (nn.ConvTranspose2d(4, 6, 1, groups=2, bias=False), (2, 4, 5, 5)),
        (nn.Linear(5, 3, bias=False), (2, 4, 5)),
    ],
)
def test_rows_times_matrices_are_what_the_layer_gives(module, inputs):
    model = nn.Sequential(module)
    weight = prunable_weights(model)["0.weight"]
    layer = layers_of(model, {"0.weight": weight}, "wanda")["0.weight"][0]
    seen = torch.randn(inputs, generator=torch.Generator().manual_seed(0))
    matrices = layer.to_matrices(module.weight.detach())
    assert torch.equal(layer.from_matrices(matrices), module.weight)
    found = layer.rows(seen) @ matrices.transpose(1, 2)  # (groups, positions, outputs of a group)
    expected = module(seen)
    if isinstance(module, nn.Linear):
        expected = expected.flatten(0, -2).T[None]
    batch, outputs = (expected.shape[0], expected.shape[1]) if not isinstance(module, nn.Linear) else (1, 3)
    found = found.view(layer.groups, batch, -1, outputs // layer.groups).permute(1, 0, 3, 2)
    assert torch.allclose(found.reshape(expected.shape), expected, atol=1e-5)


def test_a_convolution_errs_less_with_sparsegpt_than_with_magnitude():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1))
    smooth = nn.functional.interpolate(torch.randn(16, 8, 3, 3), size=12, mode="bilinear")
    smooth = torch.einsum("bchw,cd->bdhw", smooth, torch.randn(8, 8))
    wanted = model(smooth).detach()
    errors = [
        float((pruned(model, smooth, criterion)[0](smooth) - wanted).detach().square().mean())
        for criterion in ("sparsegpt", "l1")
    ]
    assert errors[0] < 0.5 * errors[1]


# ---- what layers see -----------------------------------------------------------------------------------------------


def norms(model, batch, name):
    """The root of the mean square of each input of a layer, in a run of the whole model."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return torch.cat(seen).square().mean(0).sqrt()


@pytest.mark.parametrize(
    ("build", "batch", "names"),
    [
        (lambda: llama(3), tokens(), ["model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.o_proj"]),
        (lambda: llama(3), tokens(), ["model.layers.{}.mlp.up_proj", "model.layers.{}.mlp.down_proj"]),
        (bert, texts(), ["bert.encoder.layer.{}.attention.self.key", "bert.encoder.layer.{}.output.dense"]),
        (gpt2, tokens(), ["transformer.h.{}.attn.c_attn", "transformer.h.{}.mlp.c_proj"]),
    ],
)
def test_every_layer_is_pruned_by_what_the_pruned_ones_before_it_give(build, batch, names):
    """In the finished model each layer's inputs come from pruned layers only: wanda's choice follows from them."""
    torch.manual_seed(0)
    dense = build()
    model = copy.deepcopy(dense)
    report = hfprune.prune(model, PruningConfig(criterion="wanda", target=0.5, scope="layer"), batch)
    differs = False
    for number in range(dense.config.num_hidden_layers):
        for name in (pattern.format(number) for pattern in names):
            weight = dense.get_submodule(name).weight.detach()
            kept = report.masks.kept[f"{name}.weight"]
            if isinstance(dense, type(gpt2())):
                weight, kept = weight.T, kept.T
            for source, alike in ((model, True), (dense, False)):
                scores = weight.abs() * norms(source, batch, name)
                lowest = select_rows(scores, weight.numel() // 2)
                if alike:
                    assert torch.equal(lowest, ~kept)
                else:
                    differs = differs or not torch.equal(lowest, ~kept)
    assert differs


@BOTH
def test_padding_counts_nowhere(criterion):
    model = llama()
    whole = tokens(4)["input_ids"]
    mask = torch.ones_like(whole)
    mask[:2, 6:] = 0
    masks = []
    for filler in (0, 7):
        ids = whole.masked_fill(mask == 0, filler)
        torch.manual_seed(0)
        masks.append(pruned(model, {"input_ids": ids, "attention_mask": mask}, criterion)[1].masks.digest())
    assert masks[0] == masks[1]
    full = {"input_ids": whole, "attention_mask": torch.ones_like(mask)}
    assert pruned(model, full, criterion)[1].masks.digest() != masks[0]


@BOTH
def test_a_batch_and_its_halves_prune_alike(criterion):
    model, batch = llama(), tokens(4)
    halves = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 2), slice(2, 4))]
    one, two = pruned(model, batch, criterion)[1].masks, pruned(model, halves, criterion)[1].masks
    different = sum(int((one.kept[name] != two.kept[name]).sum()) for name in one)
    assert different <= 4  # sums round differently


@BOTH
def test_offloaded_states_change_nothing(criterion):
    model, batch = llama(), tokens(4)
    one = pruned(model, batch, criterion)[1].masks.digest()
    assert pruned(model, batch, {"name": criterion, "offload": True})[1].masks.digest() == one


def test_a_shared_weight_is_pruned_once_by_all_that_it_sees():
    tied = TINY["tied"]
    torch.manual_seed(0)
    model, batch = tied.build(), tied.batch()
    dense = copy.deepcopy(model)
    report = hfprune.prune(model, PruningConfig(criterion="wanda", target=0.5, scope="layer"), batch)
    with torch.no_grad():
        both = torch.cat([batch[0], dense.upper(batch[0]).relu()])
        scores = dense.upper.weight.abs() * both.norm(dim=0)
    assert torch.equal(select_rows(scores, 32), ~report.masks.kept["upper.weight"])


@BOTH
def test_a_layer_that_is_never_used_is_refused_by_name(criterion):
    model = MLP()
    model.unused = nn.Linear(8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=f"'{criterion}' can't score 'unused.weight': it took no part in any"):
        pruned(model, vectors(), criterion)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    _, report = pruned(model, vectors(), criterion, ignore=["unused"])
    assert "unused.weight" not in report.masks.kept


# ---- counts --------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_counts_are_exact(criterion, scope):
    for ratio in (0.0, 0.013, 0.37, 0.5, 0.99):
        _, report = pruned(llama(), tokens(), criterion, ratio, scope=scope)
        parts = report.masks.sparsity().values()
        if scope == "layer":
            assert all(part.zeros == round(ratio * part.numel) for part in parts)
        else:
            assert report.masks.zeros == round(ratio * report.units)
            assert all(abs(part.zeros - ratio * part.numel) < 1 for part in parts)
        assert report.pruned == report.masks.zeros


@BOTH
def test_layers_with_a_ratio_of_their_own_and_layers_left_alone(criterion):
    options = {"per_layer": {"*.down_proj": 0.25}, "ignore": ["*.layers.1.*"], "scope": "layer"}
    model, report = pruned(llama(), tokens(), criterion, 0.5, **options)
    found = report.masks.sparsity()
    assert not any(".1." in name for name in found)
    assert {part.zeros / part.numel for name, part in found.items() if "down" in name} == {0.25}
    assert {part.zeros / part.numel for name, part in found.items() if "down" not in name} == {0.5}
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, llama_weight("model.layers.1.mlp.up_proj.weight"))


def llama_weight(name):
    torch.manual_seed(0)
    return llama().get_parameter(name)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@BOTH
def test_a_floor_of_units_is_kept(criterion):
    _, report = pruned(llama(), tokens(), criterion, 0.5, min_kept=100)
    found = report.masks.sparsity()
    assert report.masks.zeros == round(0.5 * report.units)
    assert {part.zeros for part in found.values() if part.numel == 128} == {28}
    assert all(part.zeros > 0.5 * part.numel for part in found.values() if part.numel > 128)


@BOTH
@pytest.mark.parametrize("granularity", ["weight", "2:4"])
def test_steps_keep_what_is_gone_and_end_at_the_same_count(criterion, granularity):
    schedule = {"kind": "constant", "steps": 3}
    model, report = pruned(llama(), tokens(), criterion, 0.5, granularity, schedule=schedule)
    assert report.masks.zeros == round(0.5 * report.units)
    again = hfprune.prune(model, PruningConfig(criterion=criterion, target=0.6), tokens())
    assert all(not (again.masks.kept[name] & ~kept).any() for name, kept in report.masks.kept.items())
    assert again.masks.zeros == round(0.6 * again.units)
    if granularity == "2:4":
        for kept in report.masks.kept.values():
            assert (kept.view(-1, 4).sum(1) == 2).all()


# ---- nothing is changed when it fails ------------------------------------------------------------------------------


class Late(nn.Module):
    """The second layer is given numbers that are not finite."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)

    def forward(self, x):
        return self.second(self.first(x) / 0.0)


@BOTH
def test_a_failure_leaves_the_model_as_it_was(criterion):
    cases = [
        (Late(), vectors(), ModelError, "'second.weight': it, or what it is given, is not finite"),
        (llama(), None, ConfigError, f"'{criterion}' looks at the inputs of layers and needs data"),
        (llama(), [], DataError, "the calibration data holds no batch"),
        (llama(), {"nonsense": torch.ones(2, 3)}, ModelError, "the model can't take the batch"),
        (TINY["lstm"].build(), TINY["lstm"].batch(), ConfigError, "add 'lstm' to pruning.ignore"),
        (TINY["attention"].build(), TINY["attention"].batch(), ConfigError, "add 'same' to pruning.ignore"),
    ]
    for model, data, kind, words in cases:
        model.train()
        before, use_cache = snapshot(model), getattr(getattr(model, "config", None), "use_cache", None)
        with pytest.raises(kind) as error:
            hfprune.prune(model, PruningConfig(criterion=criterion, target=0.5), data)
        assert words in str(error.value)
        assert "\n" not in str(error.value)
        assert same(before, snapshot(model))
        assert getattr(getattr(model, "config", None), "use_cache", None) == use_cache


@BOTH
def test_a_failure_in_a_later_step_leaves_the_model_as_it_was(criterion, monkeypatch):
    model = llama().bfloat16()
    before = snapshot(model)

    def fails(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("hfprune.oneshot.annotate", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        pruning = PruningConfig(criterion=criterion, target=0.5, schedule={"kind": "constant", "steps": 2})
        hfprune.prune(model, pruning, tokens())
    assert same(before, snapshot(model))


@BOTH
def test_modes_generators_and_hooks_are_untouched(criterion):
    model = llama().train()
    model.model.norm.eval()
    generator = torch.get_rng_state()
    before = {key: value for key, value in snapshot(model).items() if key.endswith(("training", "place", "grad"))}
    hfprune.prune(model, PruningConfig(criterion=criterion, target=0.5), tokens())
    assert same(before, {key: value for key, value in snapshot(model).items() if key in before})
    assert torch.equal(generator, torch.get_rng_state())
    assert model.config.use_cache
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_parameters_of_the_criteria():
    for wrong in ({"block_size": 0}, {"damping": 0}, {"damping": "a"}, {"offload": 1}, {"batches": 0}):
        key = next(iter(wrong))
        with pytest.raises(ConfigError, match=f"^pruning.criterion.{key}: "):
            hfprune.prune(CNN(), PruningConfig(criterion={"name": "sparsegpt", **wrong}, target=0.5), images())
    with pytest.raises(ConfigError, match="'wanda' takes no such parameter"):
        hfprune.prune(CNN(), PruningConfig(criterion={"name": "wanda", "damping": 0.1}, target=0.5), images())


# ---- language models -----------------------------------------------------------------------------------------------


def sentences(count, length, seed):
    """Tokens of a small grammar: each follows from the two before it, most of the time."""
    g = torch.Generator().manual_seed(seed)
    rules = torch.randint(32, (32, 32), generator=torch.Generator().manual_seed(0))
    found = torch.randint(32, (count, length), generator=g)
    for place in range(2, length):
        follows = torch.rand(count, generator=g) < 0.9
        found[:, place] = torch.where(follows, rules[found[:, place - 2], found[:, place - 1]], found[:, place])
    return found


@pytest.fixture(scope="module")
def trained():
    """A Llama of 60 thousand weights that has learnt the grammar. Its norms begin with weights of many sizes: features
    of large language models differ in size, while those of a model that small would all be alike."""
    torch.manual_seed(0)
    config = llama().config
    config.hidden_size, config.intermediate_size, config.head_dim = 48, 96, 12
    config.max_position_embeddings = 32
    model = type(llama())(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.exp(0.75 * torch.randn(parameter.shape)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=400)
    for step in range(400):
        ids = sentences(32, 24, seed=step + 1)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def perplexity(model):
    ids = sentences(64, 24, seed=10_000)
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss.exp())


@pytest.mark.parametrize("granularity", ["weight", "2:4"])
def test_perplexity_suffers_least_with_sparsegpt_and_most_with_magnitude(trained, granularity):
    data = [{"input_ids": sentences(16, 24, seed=20_000 + number)} for number in range(16)]
    found = {"dense": perplexity(trained)}
    for criterion in ("sparsegpt", "wanda", "l1"):
        named = criterion if criterion == "l1" else {"name": criterion, "batches": 16}
        model, report = pruned(trained, data, named, granularity=granularity, scope="layer")
        assert report.masks.zeros == round(0.5 * report.units)
        found[criterion] = perplexity(model)
    assert found["dense"] < 4  # of 32 tokens that are all equally likely to one who knows nothing
    assert found["dense"] < found["sparsegpt"] <= found["wanda"] < found["l1"], found
