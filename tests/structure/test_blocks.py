"""Residual blocks: those that can be dropped, and those that end in an activation or change the width."""

import timm
import torch
from torch import nn

from hfprune.structure.blocks import find_blocks
from hfprune.structure.groups import analyse
from tests.support.models import bert, llama, vit


def paths(model: nn.Module, droppable: bool) -> list[str]:
    return [block.path for block in find_blocks(analyse(model.eval()), droppable=droppable)]


def test_an_activation_after_the_sum_and_a_convolution_in_the_shortcut():
    sizes = {"layers": [2, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}
    model = timm.create_model("resnet18", **sizes, num_classes=4)
    assert paths(model, droppable=True) == []
    assert paths(model, droppable=False) == ["layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.0"]


def test_transformers_have_the_same_blocks_either_way():
    for build in (vit, bert, llama):
        model = build()
        assert paths(model, droppable=True) == paths(model, droppable=False)
        assert len(paths(model, droppable=False)) == 2


def test_a_chain_has_none():
    chain = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)))
    structure = analyse(chain, torch.randn(2, 8))
    assert find_blocks(structure, droppable=False) == []
