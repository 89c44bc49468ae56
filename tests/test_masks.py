"""Masks: packing, hashes, binding, and zeros that stay zero."""

import hashlib

import pytest
import torch
from torch import nn

from hfprune.bits import PackedTensors, mask_hash, pack_bits, unpack_bits
from hfprune.errors import CheckpointError
from hfprune.masks import MaskSet
from tests.support.models import MLP, Tied


def masks_of(model, fraction=0.5, pattern="unstructured"):
    return MaskSet({n: torch.rand(p.shape) >= fraction for n, p in model.named_parameters() if p.ndim > 1}, pattern)


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (3, 5), (2, 3, 4, 5), (0,), ()])
def test_packing_there_and_back(shape):
    mask = torch.rand(shape) < 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-mask.numel() // 8)
    assert torch.equal(unpack_bits(packed, mask.shape), mask)


def test_the_first_element_is_the_highest_bit():
    assert pack_bits(torch.tensor([True] + [False] * 8 + [True])).tolist() == [0b10000000, 0b01000000]


def test_packing_takes_the_logical_order():
    mask = torch.rand(4, 3, 2, 2) < 0.5
    assert torch.equal(pack_bits(mask.to(memory_format=torch.channels_last)), pack_bits(mask))


@pytest.mark.parametrize("packed", [torch.zeros(2, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)])
def test_bytes_of_another_shape(packed):
    with pytest.raises(CheckpointError, match=r"bytes can't be a mask of shape \(2, 3\)$"):
        unpack_bits(packed, torch.Size((2, 3)))


def test_hashes_tell_pattern_and_shape():
    zeros = torch.tensor([[True, False], [False, True]])
    assert mask_hash(zeros) == mask_hash(zeros.clone())
    assert mask_hash(zeros) != mask_hash(zeros.flip(0))
    assert mask_hash(zeros) != mask_hash(zeros.view(4))
    assert mask_hash(zeros) == hashlib.sha256(b"2,2" + bytes([0b10010000])).hexdigest()


def test_apply_zeroes_and_leaves_the_rest():
    model = MLP()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = masks_of(model).apply(model)
    for name, value in model.state_dict().items():
        kept = masks.kept.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(value, torch.where(kept, before[name], torch.zeros_like(value)))
    assert masks.zeros == sum(int((value == 0).sum()) for name, value in model.state_dict().items() if name in masks)
    assert masks.numel == 12 * 8 + 4 * 12


def test_what_is_masked_becomes_plus_zero():
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0, float("inf"), float("nan"), 2.0]]))
    MaskSet({"weight": torch.tensor([[False, False, False, True]])}).apply(model)
    assert model.weight.tolist() == [[0.0, 0.0, 0.0, 2.0]]
    assert not torch.signbit(model.weight).any()


def test_clean_turns_minus_zero():
    model = nn.Linear(2, 1, bias=False)
    masks = MaskSet({"weight": torch.tensor([[False, True]])}).apply(model)
    with torch.no_grad():
        model.weight.fill_(-1.0)
    masks.enforce()
    assert model.weight.tolist() == [[0.0, -1.0]]
    masks.clean()
    assert not torch.signbit(model.weight[0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_enforce_in_every_precision(dtype):
    model = MLP().to(dtype)
    masks = masks_of(model).apply(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    after = {name: value.clone() for name, value in model.named_parameters()}
    masks.enforce()
    for name, value in model.named_parameters():
        kept = masks.kept.get(name, torch.ones_like(value, dtype=torch.bool))
        assert value.dtype == dtype
        assert torch.equal(value, torch.where(kept, after[name], torch.zeros_like(value)))


def test_enforce_without_a_model_does_nothing():
    masks_of(MLP()).enforce()


def test_enforce_acts_on_the_parameters_bound_last():
    first, second = MLP(), MLP()
    masks = masks_of(first).apply(first)
    masks.bind(second)
    untouched = first.first.weight.clone()
    masks.enforce()
    assert torch.equal(first.first.weight, untouched)
    assert bool((second.first.weight[~masks.kept["first.weight"]] == 0).all())


def test_tied_names_both_bind():
    model = Tied()
    MaskSet({"lower.weight": torch.zeros(8, 8, dtype=torch.bool)}).apply(model)
    assert not model.upper.weight.any()


def test_masks_that_do_not_fit():
    with pytest.raises(
        CheckpointError, match=r"^the mask of 'x.weight' \(2, 2\) does not fit: the parameter is not there$"
    ):
        MaskSet({"x.weight": torch.ones(2, 2, dtype=torch.bool)}).bind(MLP())
    with pytest.raises(CheckpointError, match=r"does not fit: the parameter has the shape \(12, 8\)$"):
        MaskSet({"first.weight": torch.ones(2, 2, dtype=torch.bool)}).bind(MLP())


def test_a_mask_that_does_not_fit_changes_nothing():
    model = MLP()
    before = model.first.weight.clone()
    masks = MaskSet({"first.weight": torch.zeros(12, 8, dtype=torch.bool), "x": torch.zeros(1, dtype=torch.bool)})
    with pytest.raises(CheckpointError):
        masks.apply(model)
    assert torch.equal(model.first.weight, before)


def test_digest_is_equal_only_for_equal_masks():
    masks = masks_of(MLP())
    same = MaskSet({name: masks.kept[name].clone() for name in reversed(list(masks))})
    assert masks.digest() == same.digest()
    other = same.kept["first.weight"]
    other[0, 0] ^= True
    same.kept["first.weight"] = other
    assert masks.digest() != same.digest()
    renamed = MaskSet({f"x{name}": mask for name, mask in masks.kept.items()})
    assert masks.digest() != renamed.digest()


def test_state_there_and_back():
    model = MLP()
    masks = masks_of(model, pattern="2:4")
    packed = masks.state_dict()
    assert sum(len(bits) for bits in packed.values()) == 12 + 6
    again = MaskSet.from_state_dict(packed, model, "2:4")
    assert again.digest() == masks.digest()
    assert again.sparsity() == masks.sparsity()
    with pytest.raises(CheckpointError, match="^a mask was saved for 'y', which the model does not have$"):
        MaskSet.from_state_dict({"y": torch.zeros(1, dtype=torch.uint8)}, model, "2:4")


def test_masks_from_zeros():
    model = MLP()
    masks = masks_of(model).apply(model)
    found = MaskSet.from_zeros(model, ["first.weight", "last.weight"], "unstructured")
    assert found.digest() == masks.digest()
    assert MaskSet.from_zeros(model, ["nothing"], "unstructured").kept == {}


def test_what_a_mask_set_says():
    masks = MaskSet({"a": torch.tensor([True, False, False])}, "2:4")
    assert len(masks) == 1
    assert "a" in masks
    assert list(masks) == ["a"]
    assert masks.sparsity() == {"a": (2, 3, "2:4")}
    assert masks.gone("a").tolist() == [False, True, True]
    assert masks.gone("b") is None


def test_masks_take_one_bit_an_element_and_read_as_copies():
    held = PackedTensors({"a": torch.rand(3, 70) < 0.5, "b": torch.zeros(5, dtype=torch.bool)})
    assert [held.packed(name).bits.numel() for name in held] == [-(-210 // 8), 1]
    assert [held.count(name) for name in held] == [int(held["a"].sum()), 0]
    held["a"].zero_()
    assert held.count("a") == int(held["a"].sum()) > 0
    other = PackedTensors(held)
    del held["a"]
    assert set(held) == {"b"}
    assert set(other) == {"a", "b"}
    held.take(other, "a")
    assert torch.equal(held["a"], other["a"])
