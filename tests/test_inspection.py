"""inspect(): the groups, what they carry, what is protected; and a model that is left as it was."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import hfprune
from hfprune.errors import ConfigError, ModelError
from tests.training.setup import PlainNet, tiny_vit


def test_groups_carry_what_their_removal_saves():
    found = hfprune.inspect(tiny_vit())
    kinds = [group.kind for group in found.groups]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"head": 2, "neuron": 2, "width": 1, "layer": 2}
    neurons = next(group for group in found.groups if group.kind == "neuron")
    assert (neurons.units, neurons.params) == (48, 48 * (24 + 1 + 24))
    assert found.params == sum(parameter.numel() for parameter in tiny_vit().parameters())
    assert found.macs == hfprune.measure(tiny_vit(), batch_sizes=()).macs


def test_the_model_is_left_as_it_was():
    model = tiny_vit().train()
    before = {name: (id(value), value.clone()) for name, value in model.named_parameters()}
    hfprune.inspect(model)
    assert model.training
    assert all(id(v) == before[n][0] and torch.equal(v, before[n][1]) for n, v in model.named_parameters())


def test_only_some_kinds_and_plain_values():
    found = hfprune.inspect(tiny_vit(), granularity=["head"])
    assert {group.kind for group in found.groups} == {"head"}
    values = json.loads(json.dumps(found.to_dict()))
    assert values["groups"][0]["units"] == 3
    assert any("reaches the model's output" in reason for reason in values["protected"])


@pytest.mark.parametrize(
    ("inputs", "granularity", "error", "message"),
    [
        (torch.randn(1, 1, 8, 8), "weight", ConfigError, "granularity: 'weight' is nothing that can be removed"),
        (torch.randn(1, 3, 8, 8), None, ModelError, "can't"),
        ("text", None, ModelError, "a tensor, tuple or dict is needed"),
    ],
)
def test_bad_input_is_one_line(inputs, granularity, error, message):
    with pytest.raises(error, match=message) as caught:
        hfprune.inspect(PlainNet(), inputs, granularity)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_graph_names_the_line_and_what_still_works():
    class Decides(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(ModelError, match="test_inspection.py.*masks"):
        hfprune.inspect(Decides(), torch.randn(1, 4))
