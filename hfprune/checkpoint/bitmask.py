"""Sparse storage of tensors: what is not zero, and where it stands. Pure functions between tensors, exact to the bit.

Two encodings. `bitmask` holds one bit an element, in row-major order, the lowest bit of a byte first, and the values of
the elements whose bit is set, in the same order. `2:4` holds two values of every four along the last dimension, and for
each of them two bits that say which of the four it is: four bits a group, the lower half of a byte first. What counts
as zero is an element all of whose bits are zero, so that -0.0 is a value.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from hfprune.errors import CheckpointError

SUFFIXES = {"bitmask": (":values", ":mask"), "2:4": (":pair_values", ":pair_places")}
"""What is added to a tensor's name for its two parts, by encoding."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 18


def _half(kept: int) -> tuple[int, int]:
    """Which two of a group of four are stored, given which are kept: their mask and their places, in four bits each.

    Where fewer than two are kept, others fill up from the left; of more than two there is no such half byte: zeros.
    """
    places = [place for place in range(4) if kept >> place & 1]
    places += [place for place in range(4) if place not in places][: 2 - len(places)]
    first, second = sorted(places[:2])
    return (1 << first | 1 << second, first | second << 2) if len(places) == 2 else (0, 0)


def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For bytes, which hold two groups: kept → stored, kept → places, places → stored; 0 for a byte that can't be."""
    halves = {kept: _half(kept) for kept in range(16)}
    stored, places, back = (np.zeros(256, dtype=np.uint8) for _ in range(3))
    for low, (low_mask, low_places) in halves.items():
        for high, (high_mask, high_places) in halves.items():
            if low_mask and high_mask:
                kept = low | high << 4
                stored[kept], places[kept] = low_mask | high_mask << 4, low_places | high_places << 4
                back[places[kept]] = stored[kept]
    return stored, places, back


_STORED, _PLACES, _BACK = _tables()
_FIRST_TWO = 0b0100 << 4
"""The places of a group that is not there, in the upper half of the last byte, as if they were the first two."""


def pack(tensor: torch.Tensor, encoding: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A tensor's values and their places; None where the encoding does not hold it or takes more room than the tensor.

    Args:
        tensor: of any shape and dtype, on the CPU.
        encoding: one of those in SUFFIXES.

    Returns:
        The values, a vector of the tensor's dtype, and the places, a vector of bytes.
    """
    bits = _bits(tensor).reshape(-1).numpy()
    pairs = encoding == "2:4"
    if pairs and (tensor.ndim < 2 or tensor.shape[-1] % 4 or not len(bits)):
        return None
    places = np.empty(-(-len(bits) // 8), dtype=np.uint8)
    parts = []
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK]
        kept = part != 0
        packed = np.packbits(kept, bitorder="little")
        if pairs:
            stored = _STORED[packed]
            if not stored.all():
                return None
            kept, packed = np.unpackbits(stored, count=len(part), bitorder="little").view(bool), _PLACES[packed]
        places[start // 8 : start // 8 + len(packed)] = packed
        parts.append(np.compress(kept, part))
    if pairs and len(bits) % 8:
        places[-1] &= 15
    values = np.concatenate(parts) if parts else bits
    if values.nbytes + places.nbytes >= tensor.nbytes:
        return None
    return torch.from_numpy(values).view(tensor.dtype), torch.from_numpy(places)


def unpack(values: torch.Tensor, places: torch.Tensor, shape: tuple[int, ...], encoding: str) -> torch.Tensor:
    """The tensor that was packed, bit by bit; on the device of its values.

    Raises:
        CheckpointError: the parts do not belong to one another or to the shape.
    """
    count = _checked_count(values, places, shape, encoding)
    if values.is_meta:
        return torch.empty(shape, dtype=values.dtype, device="meta")
    return expand(values, _mask(places, count, encoding), count).view(shape)


def check_parts(values: torch.Tensor, places: torch.Tensor, shape: tuple[int, ...], encoding: str) -> None:
    """Raises as `unpack` does, without reading the values."""
    count = _checked_count(values, places, shape, encoding)
    check_mask(_mask(places, count, encoding), values)


def unpack_zeros(values: torch.Tensor, places: torch.Tensor, shape: tuple[int, ...], encoding: str) -> torch.Tensor:
    """Where the tensor that was packed equals zero, as `unpack(...) == 0` says, at less expense; raises as it does."""
    count = _checked_count(values, places, shape, encoding)
    mask = _mask(places, count, encoding)
    check_mask(mask, values)
    zeros = torch.from_numpy(np.unpackbits(~mask, count=count, bitorder="little")).view(torch.bool)
    if bool((values == 0).any()):  # -0.0, or groups of four with less than two values
        zeros |= expand((values == 0).view(torch.uint8), mask, count).view(torch.bool)
    return zeros.view(shape)


def _checked_count(values: torch.Tensor, places: torch.Tensor, shape: tuple[int, ...], encoding: str) -> int:
    """How many elements the shape has, if the parts can be those of such a tensor."""
    count = int(np.prod(shape, dtype=np.int64))
    if encoding not in SUFFIXES:
        raise CheckpointError(f"unknown encoding '{encoding}'; known: {', '.join(SUFFIXES)}")
    if places.dtype != torch.uint8 or places.ndim != 1 or values.ndim != 1:
        raise CheckpointError("places must be a vector of bytes, values a vector")
    if encoding == "2:4" and (not shape or shape[-1] % 4 or len(values) != count // 2 or len(places) != -(-count // 8)):
        raise CheckpointError(f"{len(values)} values and {len(places)} bytes of places do not fit the shape {shape}")
    if len(places) != -(-count // 8):
        raise CheckpointError(f"a mask of {len(places)} bytes does not fit {count} elements")
    return count


def _mask(places: torch.Tensor, count: int, encoding: str) -> np.ndarray:
    """One bit an element, the lowest of a byte first, whatever the encoding."""
    mask = places.cpu().numpy()
    if encoding == "2:4":
        return _mask_of_pairs(mask, count)
    if count % 8 and mask[-1] >> count % 8:
        raise CheckpointError("the mask has bits set beyond the last element")
    return mask


def check_mask(mask: np.ndarray, values: torch.Tensor) -> None:
    """Raises a CheckpointError if a mask has not as many bits set as there are values."""
    set_bits = int(np.bitwise_count(mask).sum(dtype=np.int64))
    if set_bits != len(values):
        raise CheckpointError(f"the mask has {set_bits} places, but there are {len(values)} values")


def expand(values: torch.Tensor, mask: np.ndarray, count: int) -> torch.Tensor:
    """A vector of `count` elements that holds the values where the mask's bits are set, the lowest of a byte first.

    Raises:
        CheckpointError: there are not as many values as bits.
    """
    check_mask(mask, values)
    bits = _bits(values).cpu().numpy()
    result = np.zeros(count, dtype=bits.dtype)

    def fill(stripe: tuple[int, int, int]) -> None:
        start, end, taken = stripe
        for first in range(start, end, _CHUNK):
            part = result[first : min(first + _CHUNK, end)]
            kept = np.unpackbits(mask[first // 8 : (first + _CHUNK) // 8], count=len(part), bitorder="little")
            # Places as numbers: several times as fast as a mask of bools.
            where = np.flatnonzero(kept.view(bool))
            part[where] = bits[taken : taken + len(where)]
            taken += len(where)

    stripes = _stripes(mask, count)
    if len(stripes) > 1:
        with ThreadPoolExecutor(len(stripes)) as pool:
            list(pool.map(fill, stripes))
    else:
        fill(stripes[0])
    return torch.from_numpy(result).view(values.dtype).to(values.device)


def _stripes(mask: np.ndarray, count: int) -> list[tuple[int, int, int]]:
    """Parts of a tensor for as many threads as torch may use: start, end, and the values before; small ones whole."""
    size = max(_CHUNK, -(-count // torch.get_num_threads() // _CHUNK) * _CHUNK)
    starts = range(0, max(count, 1), size)
    kept = [int(np.bitwise_count(mask[start // 8 : (start + size) // 8]).sum(dtype=np.int64)) for start in starts]
    before = [0, *itertools.accumulate(kept)]
    return [(start, min(start + size, count), taken) for start, taken in zip(starts, before, strict=False)]


def _mask_of_pairs(places: np.ndarray, count: int) -> np.ndarray:
    """The mask of a 2:4 tensor from its places."""
    if count % 8:
        places = places.copy()
        places[-1] = places[-1] & 15 | _FIRST_TWO
    mask = _BACK[places]
    if not mask.all():
        raise CheckpointError("two values of a group have the same place, or stand out of order")
    if count % 8:
        mask[-1] &= 15
    return mask


def packed_size(shape: tuple[int, ...], itemsize: int, kept: int, encoding: str) -> int:
    """Bytes that an encoding takes for a tensor with so many elements that are not zero."""
    count = int(np.prod(shape, dtype=np.int64))
    if encoding == "2:4":
        return count // 2 * itemsize + -(-count // 8)
    return kept * itemsize + -(-count // 8)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as integers of its own width."""
    if tensor.element_size() not in _INTEGERS or tensor.is_complex():
        raise CheckpointError(f"tensors of {tensor.dtype} can't be stored sparse")
    return tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
