"""Sparse storage of tensors: what is not zero, and where it stands. Pure functions between tensors, exact to the bit.

Two encodings. `bitmask` holds one bit an element, in row-major order, the lowest bit of a byte first, and the values of
the elements whose bit is set, in the same order. `2:4` holds two values of every four along the last dimension, and for
each of them two bits that say which of the four it is: four bits a group, the lower half of a byte first. What counts
as zero is an element all of whose bits are zero, so that -0.0 is a value.
"""

from __future__ import annotations

import numpy as np
import torch

from hfprune.errors import CheckpointError

SUFFIXES = {"bitmask": (":values", ":mask"), "2:4": (":pair_values", ":pair_places")}
"""What is added to a tensor's name for its two parts, by encoding."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 18


def pack(tensor: torch.Tensor, encoding: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A tensor's values and their places; None where the encoding does not hold it or takes more room than the tensor.

    Args:
        tensor: of any shape and dtype, on the CPU.
        encoding: one of those in SUFFIXES.

    Returns:
        The values, a vector of the tensor's dtype, and the places, a vector of bytes.
    """
    bits = _bits(tensor).reshape(-1)
    if encoding == "2:4":
        return _pack_pairs(tensor, bits)
    places = torch.empty(-(-bits.numel() // 8), dtype=torch.uint8)
    parts = []
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK]
        kept = part != 0
        packed = torch.from_numpy(np.packbits(kept.numpy(), bitorder="little"))
        places[start // 8 : start // 8 + len(packed)] = packed
        parts.append(part.masked_select(kept))
    values = torch.cat(parts) if parts else bits
    if values.nbytes + places.nbytes >= tensor.nbytes:
        return None
    return values.view(tensor.dtype), places


def unpack(values: torch.Tensor, places: torch.Tensor, shape: tuple[int, ...], encoding: str) -> torch.Tensor:
    """The tensor that was packed, bit by bit; on the device of its values.

    Raises:
        CheckpointError: the parts do not belong to one another or to the shape.
    """
    count = int(np.prod(shape, dtype=np.int64))
    if encoding not in SUFFIXES:
        raise CheckpointError(f"unknown encoding '{encoding}'; known: {', '.join(SUFFIXES)}")
    if places.dtype != torch.uint8 or places.ndim != 1 or values.ndim != 1:
        raise CheckpointError("places must be a vector of bytes, values a vector")
    device, dtype = values.device, values.dtype
    bits, places = _bits(values).cpu(), places.cpu()
    if encoding == "2:4":
        return _unpack_pairs(bits, places, shape).view(dtype).to(device)
    if len(places) != -(-count // 8):
        raise CheckpointError(f"a mask of {len(places)} bytes does not fit {count} elements")
    result = torch.zeros(count, dtype=bits.dtype)
    taken = 0
    for start in range(0, count, _CHUNK):
        part = result[start : start + _CHUNK]
        kept = torch.from_numpy(np.unpackbits(places[start // 8 : (start + _CHUNK) // 8].numpy(), bitorder="little"))
        if kept[len(part) :].any():
            raise CheckpointError("the mask has bits set beyond the last element")
        kept = kept[: len(part)].view(torch.bool)
        here = int(kept.sum())
        if taken + here > len(bits):
            break
        part.masked_scatter_(kept, bits[taken : taken + here])
        taken += here
    set_bits = int(np.bitwise_count(places.numpy()).sum(dtype=np.int64))
    if set_bits != len(bits):
        raise CheckpointError(f"the mask has {set_bits} places, but there are {len(bits)} values")
    return result.view(dtype).view(shape).to(device)


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


def _pack_pairs(tensor: torch.Tensor, bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    if tensor.ndim < 2 or tensor.shape[-1] % 4 or not tensor.numel():
        return None
    groups = bits.view(-1, 4)
    kept = groups != 0
    if int(kept.sum(1).max()) > 2:
        return None
    # The two places are those that are kept, filled up from the left where fewer are: a stable order.
    order = torch.sort(kept.to(torch.uint8), dim=1, descending=True, stable=True).indices[:, :2].sort(1).values
    codes = (order[:, 0] | order[:, 1] << 2).to(torch.uint8)
    if len(codes) % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    return groups.gather(1, order).reshape(-1).view(tensor.dtype), codes[::2] | codes[1::2] << 4


def _unpack_pairs(bits: torch.Tensor, places: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    groups = int(np.prod(shape, dtype=np.int64)) // 4
    if not shape or shape[-1] % 4 or len(bits) != 2 * groups or len(places) != -(-groups // 2):
        raise CheckpointError(f"{len(bits)} values and {len(places)} bytes of places do not fit the shape {shape}")
    codes = torch.stack([places & 15, places >> 4], 1).view(-1)[:groups].long()
    first, second = codes & 3, codes >> 2
    if (first >= second).any():
        raise CheckpointError("two values of a group have the same place, or stand out of order")
    result = torch.zeros(groups, 4, dtype=bits.dtype)
    result.scatter_(1, torch.stack([first, second], 1), bits.view(-1, 2))
    return result.view(shape)
