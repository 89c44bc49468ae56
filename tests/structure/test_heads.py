"""Attention in the ways that models write it, by small modules whose groups are known by thought."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hfprune
from hfprune import PruningConfig
from tests.support.structures import HALF, check, group


class Attention(nn.Module):
    """Fused queries, keys and values of two heads of three channels."""

    def __init__(self, width=5, heads=2, size=3):
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv = nn.Linear(width, 3 * heads * size)
        self.proj = nn.Linear(heads * size, 4)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        x = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, self.heads * self.size))


def test_fused_projections_lose_whole_heads():
    heads = [[start + 3 * head + i for start in (0, 6, 12) for i in range(3)] for head in range(2)]
    out = [[3 * head + i for i in range(3)] for head in range(2)]
    expected = {"qkv": group("head", 2, ("qkv.weight[0]", heads), ("qkv.bias[0]", heads), ("proj.weight[1]", out))}
    model = check(Attention(), (torch.randn(2, 4, 5),), expected)
    assert (model.heads, model.size) == (1, 3)


def test_heads_are_cut_inside_alike():
    dims = [[start + 4 * head + i for start in (0, 8, 16) for head in range(2)] for i in range(4)]
    out = [[4 * head + i for head in range(2)] for i in range(4)]
    expected = {"qkv": group("head_dim", 4, ("qkv.weight[0]", dims), ("qkv.bias[0]", dims), ("proj.weight[1]", out))}
    model = check(Attention(size=4), (torch.randn(2, 4, 5),), expected, granularity="head_dim")
    assert (model.heads, model.size) == (2, 2)


class Rotated(nn.Module):
    """Two heads of four channels, the first half of each turned against the second by angles from a buffer."""

    def __init__(self):
        super().__init__()
        self.size = 4
        self.q, self.k, self.v, self.o = (nn.Linear(*shape) for shape in ((5, 8), (5, 8), (5, 8), (8, 4)))
        self.register_buffer("frequencies", torch.tensor([1.0, 0.3]))

    def turned(self, x):
        angles = torch.arange(x.shape[2])[:, None] * torch.cat((self.frequencies, self.frequencies))
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, -1, self.size).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = (self.turned(q) @ self.turned(k).transpose(-1, -2)).softmax(-1) @ v
        return self.o(x.transpose(1, 2).reshape(b, n, -1))


def test_turned_dimensions_go_in_pairs_with_their_angle_and_values_as_many():
    model = Rotated().eval()
    inputs = (torch.randn(2, 4, 5),)
    report = hfprune.prune(model, PruningConfig(**HALF | {"granularity": "head_dim"}), example_inputs=inputs)
    assert report.groups == {"q": (2, 1), "v": (4, 2)}
    assert (len(model.frequencies), model.size) == (1, 2)
    assert (model.q.weight.shape, model.v.weight.shape, model.o.weight.shape) == ((4, 5), (4, 5), (4, 4))


class GroupedQueries(nn.Module):
    """Four heads of queries on two of keys and values, of three channels; with or without a norm of q and k."""

    def __init__(self, norms=False):
        super().__init__()
        self.size = 3
        self.q, self.k, self.v = nn.Linear(5, 12), nn.Linear(5, 6), nn.Linear(5, 6)
        self.norm_q, self.norm_k = (nn.RMSNorm(3), nn.RMSNorm(3)) if norms else (nn.Identity(), nn.Identity())
        self.o = nn.Linear(12, 4)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, -1, self.size).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = self.norm_q(q), self.norm_k(k)
        k, v = (t[:, :, None].expand(b, k.shape[1], 2, n, self.size).reshape(b, -1, n, self.size) for t in (k, v))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.o(x.transpose(1, 2).reshape(b, n, -1))


@pytest.mark.parametrize("norms", [False, True], ids=["plain", "q/k norms"])
def test_query_heads_go_with_the_keys_and_values_that_they_share(norms):
    queries = [[6 * head + i for i in range(6)] for head in range(2)]
    keys = [[3 * head + i for i in range(3)] for head in range(2)]
    places = [("q.weight[0]", queries), ("q.bias[0]", queries), ("o.weight[1]", queries)]
    places += [(f"{name}.{leaf}[0]", keys) for name in "kv" for leaf in ("weight", "bias")]
    check(GroupedQueries(norms), (torch.randn(2, 4, 5),), {"q": group("head", 2, *places)})


class Biased(nn.Module):
    """Attention of four heads with a learned bias for every distance, looked up in a table."""

    def __init__(self):
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(5, 8)
        self.table = nn.Parameter(torch.randn(7, 4))
        self.register_buffer("distance", torch.arange(4)[:, None] - torch.arange(4) + 3, persistent=False)
        self.o = nn.Linear(8, 4)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        bias = self.table[self.distance.view(-1)].view(n, n, -1).permute(2, 0, 1)
        x = ((q @ k.transpose(-1, -2)) + bias).softmax(-1) @ v
        return self.o(x.transpose(1, 2).flatten(2))


def test_a_table_of_position_biases_loses_the_columns_of_the_heads():
    heads = [[2 * head, 2 * head + 1] for head in range(4)]
    places = [(f"{name}.{leaf}[0]", heads) for name in "qkv" for leaf in ("weight", "bias")]
    expected = {"q": group("head", 4, *places, ("o.weight[1]", heads), "table[1]")}
    model = check(Biased(), (torch.randn(2, 4, 5),), expected)
    assert model.heads == 2
