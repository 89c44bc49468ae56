"""Bool tensors at one bit an element, and the hash of a pattern of zeros."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import NamedTuple

import numpy as np
import torch

from hfprune.errors import CheckpointError

PART = 1 << 24
"""Elements that are packed or unpacked at a time on a GPU, so that the work needs little memory beside the result."""


class Packed(NamedTuple):
    """A bool tensor as bytes, where it lay, with its shape and how many of its elements are true."""

    bits: torch.Tensor
    shape: torch.Size
    count: int


class PackedTensors(MutableMapping[str, torch.Tensor]):
    """Bool tensors by name, held at one bit an element on the device of each.

    Reading gives a new bool tensor; to change one, put the changed tensor back.

    Example:
        >>> held = PackedTensors({"fc.weight": torch.tensor([[True, False]])})
        >>> held["fc.weight"], held.count("fc.weight"), held.numel("fc.weight")
        (tensor([[True, False]]), 1, 2)
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor] | None = None):
        self._held: dict[str, Packed] = {}
        if isinstance(tensors, PackedTensors):
            self._held |= tensors._held
        else:
            self.update(tensors or {})

    def __getitem__(self, name: str) -> torch.Tensor:
        bits, shape, _ = self._held[name]
        return unpack_bits(bits, shape)

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        self._held[name] = Packed(pack_bits(tensor), tensor.shape, int(tensor.count_nonzero()))

    def __delitem__(self, name: str) -> None:
        del self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def packed(self, name: str) -> Packed:
        """One of them as it is held."""
        return self._held[name]

    def count(self, name: str) -> int:
        """How many elements of one are true."""
        return self._held[name].count

    def numel(self, name: str) -> int:
        """How many elements one has."""
        return self._held[name].shape.numel()

    def move(self, name: str, device: torch.device) -> None:
        """Holds one on another device."""
        self._held[name] = self._held[name]._replace(bits=self._held[name].bits.to(device))

    def take(self, other: PackedTensors, name: str) -> None:
        """Holds what another holds under a name, without unpacking it."""
        self._held[name] = other._held[name]


def pack_bits(flags: torch.Tensor) -> torch.Tensor:
    """A bool tensor of any shape as bytes, eight elements each, the first in the highest bit; on its device."""
    flat = flags.detach().reshape(-1)
    if flat.device.type == "cpu":
        return torch.from_numpy(np.packbits(flat.numpy()))
    packed = torch.empty(-(-len(flat) // 8), dtype=torch.uint8, device=flat.device)
    for start in range(0, len(flat), PART):
        part = flat[start : start + PART].to(torch.uint8)
        part = torch.nn.functional.pad(part, (0, -len(part) % 8)).view(-1, 8)
        packed[start // 8 : start // 8 + len(part)] = (part << _places(part.device)).sum(1, dtype=torch.uint8)
    return packed


def unpack_bits(packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse of `pack_bits`.

    Raises:
        CheckpointError: the bytes are not those of a bool tensor of that shape.
    """
    count = shape.numel()
    if packed.dtype != torch.uint8 or len(packed) != -(-count // 8):
        raise CheckpointError(f"{len(packed)} bytes can't be a mask of shape {tuple(shape)}")
    if packed.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=count)).view(torch.bool).view(shape)
    flat = torch.empty(8 * len(packed), dtype=torch.bool, device=packed.device)
    for start in range(0, len(packed), PART // 8):
        part = packed[start : start + PART // 8]
        flat[8 * start : 8 * (start + len(part))] = (part[:, None] >> _places(part.device) & 1).view(-1)
    return flat[:count].view(shape)


def mask_hash(zeros: torch.Tensor) -> str:
    """The sha-256 of a pattern of zeros: the shape, then `pack_bits` of where the zeros are."""
    digest = hashlib.sha256(",".join(str(n) for n in zeros.shape).encode())
    digest.update(pack_bits(zeros).cpu().numpy())
    return digest.hexdigest()


def _places(device: torch.device) -> torch.Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
