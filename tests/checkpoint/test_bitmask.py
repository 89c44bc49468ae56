"""Sparse storage: exact to the bit in every dtype, as small as promised, and loud where its parts don't fit."""

import pytest
import torch

from hfprune.checkpoint.bitmask import pack, packed_size, unpack
from hfprune.errors import CheckpointError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64, torch.int8)


def half_zero(shape, dtype, ratio=0.5):
    values = torch.randn(shape)
    values[torch.rand(shape) < ratio] = 0
    return (values * 10).to(dtype)


def two_of_four(shape, dtype):
    values = (torch.randn(shape) * 10).to(torch.float32).view(-1, 4)
    values[torch.arange(len(values))[:, None], torch.rand(values.shape).argsort(1)[:, :2]] = 0
    return values.view(shape).to(dtype)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 48), (3, 5, 7), (1001,), (2, 1 << 20)], ids=str)
def test_every_dtype_and_shape_comes_back(dtype, shape):
    tensor = half_zero(shape, dtype, 0.6)
    values, places = pack(tensor, "bitmask")
    assert values.dtype == dtype
    assert values.nbytes + places.nbytes == packed_size(shape, tensor.element_size(), len(values), "bitmask")
    assert torch.equal(bits(unpack(values, places, shape, "bitmask")), bits(tensor))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_of_four(dtype):
    tensor = two_of_four((6, 4, 20), dtype)
    tensor[0, 0, :4] = 0  # fewer than two
    values, places = pack(tensor, "2:4")
    assert (len(values), places.nbytes) == (tensor.numel() // 2, tensor.numel() // 8)
    assert torch.equal(bits(unpack(values, places, tuple(tensor.shape), "2:4")), bits(tensor))


def test_the_bytes_are_as_described():
    values, places = pack(torch.tensor([[0, 1.5, 0, 0, -2, 0, 0, 3, 0, 4]]), "bitmask")
    assert (values.tolist(), places.tolist()) == ([1.5, -2, 3, 4], [0b10010010, 0b10])
    values, places = pack(torch.tensor([[0, 1.0, 0, 2, 3, 0, 0, 0, 0, 0, 5, 6]]), "2:4")
    assert values.tolist() == [1, 2, 3, 0, 5, 6]
    assert places.tolist() == [(0 | 1 << 2) << 4 | (1 | 3 << 2), 2 | 3 << 2]


def test_negative_zero_and_not_a_number_are_values():
    tensor = torch.tensor([[-0.0, 0.0, float("nan"), float("inf")] + [0.0] * 12])
    values, places = pack(tensor, "bitmask")
    assert len(values) == 3
    assert torch.equal(bits(unpack(values, places, (1, 16), "bitmask")), bits(tensor))


@pytest.mark.parametrize(
    ("ratio", "dtype", "most"), [(0.5, torch.float32, 0.54), (0.5, torch.bfloat16, 0.57), (0.9, torch.float32, 0.14)]
)
def test_sizes(ratio, dtype, most):
    tensor = torch.randn(256, 256).to(dtype).view(-1)
    tensor[torch.randperm(tensor.numel())[: round(ratio * tensor.numel())]] = 0
    values, places = pack(tensor.view(256, 256), "bitmask")
    assert values.nbytes + places.nbytes <= most * tensor.nbytes
    tensor = two_of_four((64, 64), torch.bfloat16)
    assert sum(part.nbytes for part in pack(tensor, "2:4")) <= 0.57 * tensor.nbytes


def test_what_would_not_be_smaller_stays_dense():
    assert pack(torch.randn(8, 8), "bitmask") is None
    assert pack(torch.ones(4, 8), "2:4") is None
    assert pack(torch.zeros(4, 6), "2:4") is None


def test_parts_that_do_not_fit():
    values, places = pack(half_zero((8, 16), torch.float32), "bitmask")
    with pytest.raises(CheckpointError, match="the mask has .* places, but there are"):
        unpack(values[:-1], places, (8, 16), "bitmask")
    with pytest.raises(CheckpointError, match="does not fit 136 elements"):
        unpack(values, places, (8, 17), "bitmask")
    with pytest.raises(CheckpointError, match="beyond the last element"):
        unpack(torch.ones(8), torch.tensor([255], dtype=torch.uint8), (7,), "bitmask")
    with pytest.raises(CheckpointError, match="unknown encoding 'zip'"):
        unpack(values, places, (8, 16), "zip")
    values, places = pack(two_of_four((4, 8), torch.float32), "2:4")
    with pytest.raises(CheckpointError, match="do not fit the shape"):
        unpack(values[:-1], places, (4, 8), "2:4")
    with pytest.raises(CheckpointError, match="same place"):
        unpack(values, torch.zeros_like(places), (4, 8), "2:4")
