"""Every family of operations, by a small module whose groups are known by thought; cut, against zeroed channels."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hfprune.structure.groups import analyse
from tests.support.structures import check, group


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(5, 8)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.RMSNorm(8)
        self.up1, self.down1 = nn.Linear(8, 6), nn.Linear(6, 8)
        self.up2, self.down2 = nn.Linear(8, 4), nn.Linear(4, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.down1(self.up1(self.norm1(x)).relu())
        x = x + self.down2(F.gelu(self.up2(self.norm2(x))))
        return self.head(x)


def test_a_residual_stream_is_one_group():
    stream = ("stem.weight[0]", "stem.bias[0]", "norm1.weight[0]", "norm1.bias[0]", "norm2.weight[0]", "up1.weight[1]",
              "down1.weight[0]", "down1.bias[0]", "up2.weight[1]", "down2.weight[0]", "head.weight[1]")  # fmt: skip
    expected = {
        "stem": group("width", 8, *stream),
        "up1": group("neuron", 6, "up1.weight[0]", "up1.bias[0]", "down1.weight[1]"),
        "up2": group("neuron", 4, "up2.weight[0]", "up2.bias[0]", "down2.weight[1]"),
    }
    check(Residual(), (torch.randn(2, 5),), expected)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.third = nn.Conv2d(10, 4, 3, padding=1)
        self.head = nn.Linear(14, 3)

    def forward(self, x):
        x = self.first(x).relu()
        x = torch.cat([x, self.second(x).relu()], 1)
        x = torch.cat([self.third(self.norm(x).relu()), x], 1)
        return self.head(x.mean((2, 3)))


def test_concatenated_features_keep_their_places():
    norm = ("norm.weight[0]", "norm.bias[0]", "norm.running_mean[0]", "norm.running_var[0]")

    def later(start, units):
        return [[i] for i in range(start, start + units)]

    expected = {
        "first": group("channel", 4, "first.weight[0]", "first.bias[0]", "second.weight[1]", "third.weight[1]", *norm,
                       ("head.weight[1]", later(4, 4))),
        "second": group("channel", 6, "second.weight[0]", "second.bias[0]", *((n, later(4, 6)) for n in norm),
                        ("third.weight[1]", later(4, 6)), ("head.weight[1]", later(8, 6))),
        "third": group("channel", 4, "third.weight[0]", "third.bias[0]", "head.weight[1]"),
    }  # fmt: skip
    check(Dense(), (torch.randn(2, 3, 5, 5),), expected)


class Split(nn.Module):
    def __init__(self):
        super().__init__()
        self.sizes = [6, 4]
        self.fused = nn.Linear(5, 10)
        self.left, self.right = nn.Linear(6, 3), nn.Linear(4, 3)

    def forward(self, x):
        left, right = self.fused(x).relu().split(self.sizes, -1)
        return self.left(left) + self.right(right)


def test_parts_of_one_layer_are_groups_of_their_own():
    left, right = [[i] for i in range(6)], [[i] for i in range(6, 10)]
    expected = {
        "fused": group("neuron", 6, ("fused.weight[0]", left), ("fused.bias[0]", left), "left.weight[1]"),
        "fused#2": group("neuron", 4, ("fused.weight[0]", right), ("fused.bias[0]", right), "right.weight[1]"),
    }
    model = check(Split(), (torch.randn(2, 5),), expected)
    assert model.sizes == [3, 2]


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(3, 6, 1)
        self.depth = nn.Conv2d(6, 6, 3, groups=6)
        self.narrow = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.narrow(self.depth(self.wide(x)).relu()).mean((2, 3))


def test_a_depthwise_convolution_follows_what_goes_in():
    members = ("wide.weight[0]", "wide.bias[0]", "depth.weight[0]", "depth.bias[0]", "narrow.weight[1]")
    model = check(Depthwise(), (torch.randn(2, 3, 5, 5),), {"wide": group("channel", 6, *members)})
    assert (model.depth.groups, model.depth.in_channels, model.depth.out_channels) == (3, 3, 3)


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2, bias=False)
        self.last = nn.Conv2d(12, 2, 1)

    def forward(self, x):
        return self.last(self.grouped(self.first(x).relu()).relu()).mean((2, 3))


def test_a_grouped_convolution_is_cut_alike_in_every_group():
    into = [[i, i + 4] for i in range(4)]
    out = [[i, i + 6] for i in range(6)]
    expected = {
        "first": group("channel", 4, ("first.weight[0]", into), ("first.bias[0]", into), "grouped.weight[1]"),
        "grouped": group("channel", 6, ("grouped.weight[0]", out), ("last.weight[1]", out)),
    }
    model = check(Grouped(), (torch.randn(2, 3, 5, 5),), expected)
    assert (model.grouped.groups, model.grouped.in_channels, model.grouped.out_channels) == (2, 4, 6)


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.norm = nn.GroupNorm(2, 8)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu()).mean((2, 3))


def test_a_group_norm_is_cut_alike_in_every_group():
    pairs = [[i, i + 4] for i in range(4)]
    places = ("first.weight[0]", "first.bias[0]", "norm.weight[0]", "norm.bias[0]", "last.weight[1]")
    expected = {"first": group("channel", 4, *((place, pairs) for place in places))}
    model = check(Norms(), (torch.randn(2, 3, 5, 5),), expected)
    assert (model.norm.num_groups, model.norm.num_channels) == (2, 4)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 8)
        self.both, self.last = nn.Linear(8, 8), nn.Linear(4, 3)

    def forward(self, x):
        x = self.down(F.silu(self.gate(x)) * self.up(x))
        return self.last(F.glu(self.both(x)))


def test_gates_go_with_what_they_gate():
    halves = [[i, i + 4] for i in range(4)]
    places = ("gate.weight[0]", "gate.bias[0]", "up.weight[0]", "up.bias[0]", "down.weight[1]")
    expected = {
        "gate": group("neuron", 6, *places),
        "down": group("neuron", 8, "down.weight[0]", "down.bias[0]", "both.weight[1]"),
        "both": group("neuron", 4, ("both.weight[0]", halves), ("both.bias[0]", halves), "last.weight[1]"),
    }
    check(Gated(), (torch.randn(2, 5),), expected)


class Padded(nn.Module):
    """A shortcut without parameters, as the ResNets for CIFAR have it: strided, and padded with zero channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.body(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.head(x.relu().mean((2, 3)))


def test_a_padded_shortcut_ties_the_channels_in_its_middle():
    middle = [[i + 2] for i in range(4)]
    places = ("stem.weight[0]", "stem.bias[0]", "body.weight[1]")
    later = ("body.weight[0]", "body.bias[0]", "head.weight[1]")
    model, inputs = Padded(), (torch.randn(2, 3, 6, 6),)
    check(model, inputs, {"stem": group("width", 4, *places, *((place, middle) for place in later))})
    protected = analyse(model, inputs).protected
    assert any("fixed size" in reason and "body.weight[0]" in members for reason, members in protected.items())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.inner = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.answer = nn.Linear(8, 11, bias=False)
        self.answer.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids)
        return self.answer(x + self.inner(x))


def test_tied_embeddings_stay_tied():
    places = ("inner.weight[0]", "inner.weight[1]", "inner.bias[0]", "words.weight[1]")
    expected = {"inner": group("width", 8, *places)}
    model = check(Tied(), (torch.randint(0, 11, (2, 5)),), expected)
    assert model.answer.weight is model.words.weight
    assert model.words.embedding_dim == model.answer.in_features == 4


class Excited(nn.Module):
    """Squeeze and excitation."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1)
        self.squeeze, self.excite = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1)

    def forward(self, x):
        x = self.first(x).relu()
        x = x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.last(x).mean((2, 3))


def test_squeeze_and_excitation_goes_with_its_channels():
    places = ("first.weight[0]", "first.bias[0]", "last.weight[1]", "squeeze.weight[1]", "excite.weight[0]",
              "excite.bias[0]")  # fmt: skip
    expected = {
        "first": group("channel", 6, *places),
        "squeeze": group("neuron", 4, "squeeze.weight[0]", "squeeze.bias[0]", "excite.weight[1]"),
    }
    check(Excited(), (torch.randn(2, 3, 4, 4),), expected)


class Transposed(nn.Module):
    """Linear layers whose weights lie the other way round: GPT-2's, one applied by hand, one transposed twice."""

    def __init__(self):
        super().__init__()
        self.up, self.down = Conv1D(6, 5), Conv1D(8, 6)
        self.matrix = nn.Parameter(torch.randn(4, 8))
        self.other = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        x = self.down(F.gelu(self.up(x)))
        return F.linear((x @ self.matrix.t()).relu(), self.other.T)


def test_transposed_weights_are_cut_along_the_right_dimension():
    expected = {
        "up": group("neuron", 6, "up.weight[1]", "up.bias[0]", "down.weight[0]"),
        "down": group("neuron", 8, "down.weight[1]", "down.bias[0]", "matrix[1]"),
        "matrix": group("neuron", 4, "matrix[0]", "other[0]"),
    }
    model = check(Transposed(), (torch.randn(2, 4, 5),), expected)
    assert (model.up.nf, model.down.nx) == (3, 3)


class Token(nn.Module):
    """A class token, position embeddings and a layer scale, used as they are."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Linear(5, 8)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 4, 8))
        self.inner, self.scale = nn.Linear(8, 8), nn.Parameter(torch.randn(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.patch(x)], 1) + self.positions
        return self.head((x + self.scale * self.inner(x))[:, 0])


def test_parameters_that_are_used_directly_follow_the_stream():
    places = ("patch.weight[0]", "patch.bias[0]", "token[2]", "positions[2]", "inner.weight[0]", "inner.weight[1]",
              "inner.bias[0]", "scale[0]", "head.weight[1]")  # fmt: skip
    check(Token(), (torch.randn(2, 3, 5),), {"patch": group("width", 8, *places)})


class Shuffled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(4, 2, 1)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x):
        return self.last(self.shuffle(self.first(x)).relu()).mean((2, 3))


def test_pixel_shuffle_ties_the_channels_of_a_pixel():
    squares = [[4 * i + j for j in range(4)] for i in range(4)]
    expected = {
        "first": group("channel", 4, ("first.weight[0]", squares), ("first.bias[0]", squares), "last.weight[1]")
    }
    check(Shuffled(), (torch.randn(2, 3, 4, 4),), expected)


class Interleaved(nn.Module):
    """ShuffleNet's channel shuffle between two grouped convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.first, self.last = nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 4, 3, padding=1, groups=2)

    def forward(self, x):
        x = self.first(self.stem(x).relu()).relu()
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.last(x).mean((2, 3))


def test_a_channel_shuffle_moves_the_indices():
    halves = [[i, i + 4] for i in range(4)]
    # Position i of the first group goes to 2i, of the second to 2i + 1; the next convolution ties i and i + 4.
    expected = {
        "stem": group("channel", 4, ("stem.weight[0]", halves), ("stem.bias[0]", halves), "first.weight[1]"),
        "first": group("channel", 2, ("first.weight[0]", [[0, 2, 4, 6], [1, 3, 5, 7]]),
                       ("first.bias[0]", [[0, 2, 4, 6], [1, 3, 5, 7]]), ("last.weight[1]", [[0, 1], [2, 3]])),
    }  # fmt: skip
    check(Interleaved(), (torch.randn(2, 3, 4, 4),), expected)


@torch.library.custom_op("hfprune_tests::twist", mutates_args=())
def twist(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-1) + x


@twist.register_fake
def _(x):
    return torch.empty_like(x)


class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.after, self.last = nn.Linear(5, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.after(twist(self.before(x))).relu())


def test_an_unknown_operation_protects_what_it_touches_and_is_named():
    inputs = (torch.randn(2, 5),)
    model = Strange()
    expected = {"after": group("neuron", 8, "after.weight[0]", "after.bias[0]", "last.weight[1]")}
    structure = analyse(model, inputs)
    assert list(structure.walk.unknown) == ["twist"]
    reason = next(reason for reason, members in structure.protected.items() if "before.weight[0]" in members)
    assert "'twist' is not followed" in reason
    check(model, inputs, expected)
