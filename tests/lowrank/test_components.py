"""Components against their definitions: what is lost without them, and what the loss says of them."""

import pytest
import torch
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from hfprune.criteria import create
from hfprune.criteria.calibration import gather
from hfprune.lowrank.components import components_of
from hfprune.lowrank.factor import factored_like, fill, largest_rank, merged
from hfprune.weights import Weight, prunable_weights
from tests.support.models import llama, tokens


def layer(kind):
    torch.manual_seed(0)
    return {
        "linear": lambda: nn.Linear(10, 7),
        "conv1d of gpt2": lambda: Conv1D(7, 10),
        "conv": lambda: nn.Conv2d(3, 8, (3, 2), stride=2, padding=1, bias=False),
        "circular": lambda: nn.Conv1d(4, 6, 3, padding=2, dilation=2, padding_mode="circular"),
        "1x1": lambda: nn.Conv2d(6, 5, 1),
    }[kind]()


def batch(kind):
    g = torch.Generator().manual_seed(1)
    shape = {"conv": (3, 3, 9, 8), "circular": (3, 4, 9), "1x1": (2, 6, 5, 5)}.get(kind, (3, 4, 10))
    return torch.randn(shape, generator=g) * torch.rand(shape[-1], generator=g)


KINDS = ("linear", "conv1d of gpt2", "conv", "circular", "1x1")
kinds = pytest.mark.parametrize("kind", KINDS)


def factored(module, parts, rank):
    small = factored_like(module, rank)
    fill(small, parts.left[:, :rank], parts.right[:rank])
    return small


@kinds
def test_all_components_are_the_layer(kind):
    module, x = layer(kind), batch(kind)
    parts = components_of(create("singular_value"), "weight", module)
    small = factored(module, parts, len(parts.scores))
    assert torch.allclose(small(x), module(x), atol=1e-5)
    assert torch.allclose(small.product(), module.weight, atol=1e-6)
    again = merged(small)
    assert type(again) is type(module) and torch.allclose(again.weight, module.weight, atol=1e-6)
    assert again.bias is module.bias and torch.allclose(again(x), module(x), atol=1e-5)
    assert torch.allclose(parts.left.norm(dim=0), parts.right.norm(dim=1), rtol=1e-4)


@kinds
def test_singular_values_say_what_the_weight_loses(kind):
    module = layer(kind)
    parts = components_of(create("singular_value"), "weight", module)
    for rank in (1, 3):
        lost = (factored(module, parts, rank).product() - module.weight).square().sum()
        assert torch.allclose(lost, parts.scores[rank:].sum(), rtol=1e-4)


@kinds
def test_whitening_says_what_the_outputs_lose(kind):
    module, x = layer(kind), batch(kind)
    root = nn.Sequential(module)
    weights = {"0.weight": Weight("0.weight", module.weight, 0 if kind == "conv1d of gpt2" else 1)}
    criterion = create("whitening", {"damping": 1e-6})
    statistics = gather(criterion, root, weights, [x], loss=lambda model, b: model(b).sum())
    parts = components_of(criterion, "0.weight", module, statistics["0.weight"])
    plain = components_of(create("singular_value"), "0.weight", module)
    for rank in (1, 3):
        lost, lost_plain = ((factored(module, p, rank)(x) - module(x)).square().sum() for p in (parts, plain))
        assert torch.allclose(lost, parts.scores[rank:].sum(), rtol=1e-2)
        assert lost < lost_plain


@kinds
def test_taylor_is_the_gradient_by_the_singular_value(kind):
    module, x = layer(kind), batch(kind)
    matrix = module.weight.detach()
    matrix = matrix.t() if kind == "conv1d of gpt2" else matrix.flatten(1)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values.requires_grad_(True)
    weight = (left * values) @ right
    weight = weight.t() if kind == "conv1d of gpt2" else weight.view(module.weight.shape)
    loss = torch.func.functional_call(module, {"weight": weight}, (x,)).square().mean()
    (slopes,) = torch.autograd.grad(loss, values)
    (gradient,) = torch.autograd.grad(module(x).square().mean(), module.weight)
    for name, expected in (("taylor", (values * slopes).square()), ("snip", (values * slopes).abs())):
        parts = components_of(create(name), "weight", module, (gradient,))
        assert torch.allclose(parts.scores, expected.detach().sort(descending=True).values, rtol=1e-3, atol=1e-9)


def test_only_leading_components_are_held_and_scores_are_normalised():
    parts = components_of(create("l1"), "weight", layer("linear"), normalize="mean", most=2)
    assert parts.left.shape == (7, 2) and parts.right.shape == (2, 10)
    assert len(parts.scores) == 7 and torch.allclose(parts.scores.mean(), torch.ones(()))
    assert bool((parts.scores[:-1] >= parts.scores[1:]).all())


@pytest.mark.parametrize(("shape", "rank"), [((4, 4), 1), ((2, 2), 0), ((12, 8), 4), ((100, 300), 74)])
def test_the_largest_rank_that_saves(shape, rank):
    rows, columns = shape
    assert largest_rank(nn.Linear(columns, rows)) == rank
    assert rank * (rows + columns) < rows * columns <= (rank + 1) * (rows + columns)


def moments(model, batch):
    weights = prunable_weights(model)
    found = gather(create("whitening"), model, weights, [batch], loss=lambda m, b: m(**b).logits.sum())
    return {name: statistics[0] for name, statistics in found.items()}


def encoder_decoder():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
    return BartForConditionalGeneration(BartConfig(vocab_size=64, **sizes, **heads)).eval()


@pytest.mark.parametrize("build", [llama, encoder_decoder])
def test_padding_counts_nowhere(build):
    model, ids = build(), tokens(4)["input_ids"].clamp_min(3)
    mask = torch.ones_like(ids)
    mask[:2, 6:] = 0
    # A decoder's own tokens are as many, and all of them real.
    decoder = {"decoder_input_ids": ids.flip(1)} if build is encoder_decoder else {}
    one, two = (
        moments(model, {"input_ids": ids.masked_fill(mask == 0, filler), "attention_mask": mask, **decoder})
        for filler in (5, 9)
    )
    assert one.keys() == two.keys() and one
    for name, moment in one.items():
        assert torch.allclose(moment, two[name], rtol=1e-4, atol=1e-5), name
    if build is llama:
        parts = [moments(model, {"input_ids": rows}) for rows in (ids[:2, :6], ids[2:])]
        for name, moment in one.items():
            assert torch.allclose(moment, parts[0][name] + parts[1][name], rtol=1e-4, atol=1e-4), name
