"""Which parameters are pruned, and what patterns choose."""

import pytest
import torch
from torch import nn

from hfprune.errors import ConfigError
from hfprune.weights import check_pattern, pattern_for, prunable_weights
from tests.support.models import CNN, MLP, TINY, Attention, Convolutions, Recurrent, Tied, gpt2


def names(model, **patterns):
    return list(prunable_weights(model, **patterns))


def refusal(model, **patterns):
    with pytest.raises(ConfigError) as error:
        prunable_weights(model, **patterns)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_linear_and_convolution_weights_in_the_models_order():
    assert names(CNN()) == ["conv1.weight", "conv2.weight", "head.weight"]


def test_input_dimensions():
    found = prunable_weights(Convolutions())
    assert {name: weight.input_dim for name, weight in found.items()} == {
        "grouped.weight": 1,
        "transposed.weight": 0,
        "both.weight": 0,
        "line.weight": 1,
    }


def test_recurrent_and_attention_weights():
    assert len(names(Recurrent())) == 8 + 1
    assert names(Attention()) == [
        "same.in_proj_weight",
        "same.out_proj.weight",
        "cross.q_proj_weight",
        "cross.k_proj_weight",
        "cross.v_proj_weight",
        "cross.out_proj.weight",
        "head.weight",
    ]


def test_gpt2_stands_inputs_first_and_its_tied_head_stays():
    found = prunable_weights(gpt2())
    assert len(found) == 8
    assert all(weight.input_dim == 0 for weight in found.values())
    assert not any("wte" in name or "lm_head" in name for name in found)


def test_a_tied_weight_stands_once_under_its_first_name():
    assert names(Tied()) == ["upper.weight", "head.weight"]


@pytest.mark.parametrize("name", TINY)
def test_biases_norms_and_embeddings_are_left_alone(name):
    model = TINY[name].build()
    for found in prunable_weights(model).values():
        assert found.parameter.ndim > 1
        owner = model.get_submodule(found.name.rpartition(".")[0])
        assert not isinstance(owner, nn.Embedding)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"include": ["conv1"]}, ["conv1.weight"]),
        ({"include": ["conv*"]}, ["conv1.weight", "conv2.weight"]),
        ({"include": ["*"]}, ["conv1.weight", "conv2.weight", "head.weight"]),
        ({"include": ["*.weight"], "ignore": ["norm*"]}, ["conv1.weight", "conv2.weight", "head.weight"]),
        ({"ignore": ["head"]}, ["conv1.weight", "conv2.weight"]),
        ({"ignore": ["head", "conv[12]"], "include": ["norm1"]}, ["norm1.weight"]),
        ({"include": ["*.bias"]}, ["conv1.bias", "norm1.bias", "norm2.bias", "head.bias"]),
        ({"include": ["*norm*"]}, ["norm1.weight", "norm2.weight"]),
        ({"include": ["*norm*.bias"]}, ["norm1.bias", "norm2.bias"]),
        ({"include": ["conv1", "conv1.bias"]}, ["conv1.weight", "conv1.bias"]),
    ],
)
def test_patterns(patterns, expected):
    assert names(CNN(), **patterns) == expected


def test_a_pattern_over_a_block_reaches_its_layers_only():
    found = names(gpt2(), include=["transformer.h.0"])
    assert found == [f"transformer.h.0.{n}.weight" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]


def test_an_embedding_is_named_by_either_of_its_names():
    assert names(gpt2(), include=["lm_head"]) == ["transformer.wte.weight"]
    assert names(gpt2(), include=["*.wte"]) == ["transformer.wte.weight"]


def test_ignore_takes_a_tied_weight_by_either_name():
    assert names(Tied(), ignore=["lower"]) == ["head.weight"]
    assert names(Tied(), include=["lower"]) == ["upper.weight"]


@pytest.mark.parametrize("key", ["include", "ignore"])
def test_a_pattern_that_matches_nothing(key):
    assert refusal(CNN(), **{key: ["conv_1"]}) == (
        f"pruning.{key}: 'conv_1' matches nothing in the model; did you mean 'conv1'?"
    )
    assert "the model has e.g. 'conv1'" in refusal(CNN(), **{key: ["zzzz"]})


def test_nothing_left():
    assert refusal(CNN(), ignore=["*"]) == "pruning.ignore: ['*'] leaves nothing to prune"
    assert refusal(CNN(), include=["head"], ignore=["head"]) == "pruning.include: ['head'] leaves nothing to prune"
    assert "leaves nothing to prune" in refusal(nn.Sequential(nn.LayerNorm(3)))


def test_patterns_in_their_order():
    assert pattern_for("a.b.weight", ["x", "a.*", "a"]) == "a.*"
    assert pattern_for("a.b.weight", ["a.b"]) == "a.b"
    assert pattern_for("ab.weight", ["a"]) is None
    check_pattern(MLP(), "first.weight", "pruning.include")


@pytest.mark.parametrize("name", TINY)
def test_matrices_and_input_views_there_and_back(name):
    for weight in prunable_weights(TINY[name].build()).values():
        value = weight.parameter.detach()
        matrix = weight.as_matrix(value)
        output_dim = 1 - weight.input_dim
        assert matrix.shape == (value.shape[output_dim], value.numel() // value.shape[output_dim])
        assert torch.equal(weight.from_matrix(matrix), value)
        assert weight.input_last(value).shape[-1] == value.shape[weight.input_dim]


def test_a_vector_is_one_row():
    weight = prunable_weights(MLP(), include=["first.bias"])["first.bias"]
    matrix = weight.as_matrix(weight.parameter)
    assert matrix.shape == (1, 12)
    assert torch.equal(weight.from_matrix(matrix), weight.parameter)
