"""Safetensors files read and written a tensor at a time: a file is laid out first and then filled, in any order."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch

from hfprune.checkpoint.tensors import opened
from hfprune.errors import CheckpointError

COPIED = 1 << 24
"""Bytes that are copied in one go."""

_LENGTH = 8


@dataclass(frozen=True)
class Place:
    """Where a tensor lies.

    Attributes:
        path: the file.
        dtype: as the file names it, such as `BF16`.
        shape: the tensor's.
        start, stop: its bytes, counted from the beginning of the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.stop - self.start

    def cut_to(self, shape: tuple[int, ...]) -> Place:
        """The place of a tensor of the same dtype and another shape, which lies nowhere yet."""
        count = prod(self.shape)
        return Place(self.path, self.dtype, shape, 0, self.size // count * prod(shape) if count else 0)


def places(path: Path) -> dict[str, Place]:
    """The tensors of a file, in the order in which they lie there; none is read.

    Raises:
        CheckpointError: the file is damaged.
    """
    with opened(path):  # the library's own checks
        pass
    header, base = _header(path)
    found = {
        name: Place(path, entry["dtype"], tuple(entry["shape"]), *(base + at for at in entry["data_offsets"]))
        for name, entry in header.items()
        if name != "__metadata__"
    }
    return dict(sorted(found.items(), key=lambda item: item[1].start))


def metadata(path: Path) -> dict[str, str]:
    """What a file says of itself beside its tensors."""
    return _header(path)[0].get("__metadata__", {})


def read(place: Place, name: str) -> torch.Tensor:
    """A tensor, as a view of the file, whose pages are read when they are looked at and let go of with the tensor."""
    _RELIEF.before(place.size)
    with opened(place.path) as file:
        return file.get_tensor(name)


class _Relief:
    """Gives back to the system what the C library keeps of freed memory, every so many bytes that are read.

    Without it the heap grows with the model: tensors a little larger than those before them don't fit in the gaps.
    """

    def __init__(self, every: int):
        self.every = every
        self._since = every
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

    def before(self, size: int) -> None:
        """A tensor of so many bytes is about to be read."""
        self._since += size
        if self._trim is not None and self._since >= self.every:
            self._since = 0
            self._trim(0)


_RELIEF = _Relief(1 << 21)  # where it was rarer, the heap of a model of many small layers still grew


class ShardWriter:
    """The safetensors files of one checkpoint; each is laid out with all its tensors, which are then put there one by
    one.

    Args:
        folder: where they lie.
        layout: file name → tensor name → the place whose dtype and shape it has.
        notes: file name → what the file says of itself.
    """

    def __init__(self, folder: Path, layout: Mapping[str, Mapping[str, Place]], notes: Mapping[str, dict[str, str]]):
        self.places: dict[str, Place] = {}
        self._left: set[str] = set()
        for file, tensors in layout.items():
            self._lay_out(folder / file, tensors, notes.get(file, {}))

    def _lay_out(self, path: Path, tensors: Mapping[str, Place], notes: dict[str, str]) -> None:
        entries: dict[str, object] = {"__metadata__": notes} if notes else {}
        ends, at = {}, 0
        for name, place in tensors.items():
            ends[name] = at, at + place.size
            entries[name] = {"dtype": place.dtype, "shape": list(place.shape), "data_offsets": list(ends[name])}
            at += place.size
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % _LENGTH)  # the format's alignment
        base = _LENGTH + len(header)
        with path.open("wb") as file:
            file.write(len(header).to_bytes(_LENGTH, "little") + header)
            file.truncate(base + at)
        for name, place in tensors.items():
            start, stop = ends[name]
            self.places[name] = Place(path, place.dtype, place.shape, base + start, base + stop)
        self._left |= set(tensors)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Writes a tensor; one that was written before is replaced.

        Raises:
            CheckpointError: it is not as it was laid out.
        """
        place = self.places[name]
        if tuple(tensor.shape) != place.shape or tensor.nbytes != place.size:
            raise CheckpointError(f"'{name}' has the shape {tuple(tensor.shape)}, and {place.shape} was laid out")
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        with place.path.open("r+b") as file:
            file.seek(place.start)
            file.write(flat.data)
        self._left.discard(name)

    def copy(self, name: str, source: Place) -> None:
        """Copies a tensor from another file, a part at a time."""
        place, left = self.places[name], source.size
        with source.path.open("rb") as origin, place.path.open("r+b") as file:
            origin.seek(source.start)
            file.seek(place.start)
            while left:
                left -= file.write(_some(origin, min(COPIED, left)))
        self._left.discard(name)

    def unwritten(self) -> list[str]:
        """The tensors that are laid out and not written yet."""
        return [name for name in self.places if name in self._left]


def _some(file: BinaryIO, count: int) -> bytes:
    part = file.read(count)
    if len(part) < count:
        raise CheckpointError(f"'{file.name}' ends in the middle of a tensor")
    return part


def _header(path: Path) -> tuple[dict, int]:
    """A file's header, and where its tensors begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        return json.loads(file.read(length)), _LENGTH + length
