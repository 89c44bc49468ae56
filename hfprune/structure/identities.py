"""Channel identities: which removable unit every element of a tensor belongs to, one layer an independent direction."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch


class Partition:
    """Integers grown on demand, and which of them have been found equal. Zero stands for 'belongs to nothing'."""

    def __init__(self) -> None:
        self._parent = np.zeros(1, np.int64)
        self.size = 1
        self.changes = 0

    def fresh(self, count: int) -> torch.Tensor:
        """So many new identities, shape (count,)."""
        start, self.size = self.size, self.size + count
        if self.size > len(self._parent):
            grown = np.arange(max(self.size, 2 * len(self._parent)), dtype=np.int64)
            grown[: len(self._parent)] = self._parent
            self._parent = grown
        return torch.arange(start, self.size)

    def find(self, identities: torch.Tensor) -> torch.Tensor:
        """The representative of every identity, in the same shape."""
        parent = self._parent
        found = parent[identities.numpy()]
        while True:
            further = parent[found]
            if np.array_equal(further, found):
                return torch.from_numpy(np.asarray(found))
            found = further

    def union(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Makes pairs equal (shapes broadcast; pairs with a zero are skipped); gives those that were not yet so."""
        left, right = torch.broadcast_tensors(self.find(left), self.find(right))
        new = ((left != right) & (left != 0) & (right != 0)).numpy()
        if not new.any():
            return torch.zeros(2, 0, dtype=torch.int64)
        packed = np.unique(left.numpy()[new] * self.size + right.numpy()[new])
        pairs = np.stack([packed // self.size, packed % self.size])
        parent, low, high = self._parent, pairs.min(0), pairs.max(0)
        ends = np.concatenate([low, high])
        if len(np.unique(ends)) == len(ends):  # no identity in two pairs: all at once
            parent[high] = low
            self.changes += len(low)
            return torch.from_numpy(pairs)
        for a, b in zip(*pairs.tolist(), strict=True):
            while parent[a] != a:
                parent[a] = a = parent[parent[a]]
            while parent[b] != b:
                parent[b] = b = parent[parent[b]]
            if a != b:
                parent[max(a, b)] = min(a, b)
                self.changes += 1
        return torch.from_numpy(pairs)

    def labels(self) -> np.ndarray:
        """The representative of every identity from 0 on."""
        return self.find(torch.arange(self.size)).numpy()


@dataclass(frozen=True)
class Value:
    """What is known of a tensor in the graph.

    Attributes:
        shape: the tensor's.
        layers: identity tensors of the same number of dimensions, with size 1 where the identity does not vary; each
            layer is a direction of its own in which the tensor can be cut, so that an element belongs to one unit
            a layer.
        constant: the tensor itself where it is known: buffers and constants.
        is_parameter: whether it is a parameter or a buffer, reshaped at most.
    """

    shape: tuple[int, ...]
    layers: tuple[torch.Tensor, ...] = ()
    constant: torch.Tensor | None = None
    is_parameter: bool = False

    def full(self) -> list[torch.Tensor]:
        """The layers, expanded to the tensor's shape without taking memory."""
        return [layer.expand(self.shape) for layer in self.layers]

    def along(self, dim: int) -> torch.Tensor | None:
        """The layer that varies along this dimension alone, flat; None where there is none."""
        dim %= max(len(self.shape), 1)
        return next((layer.flatten() for layer in self.layers if axes(layer) == {dim}), None)


def axes(layer: torch.Tensor) -> frozenset[int]:
    """The dimensions that a compact layer varies along."""
    return frozenset(d for d, size in enumerate(layer.shape) if size > 1)


def compact(layer: torch.Tensor) -> torch.Tensor:
    """The layer with every dimension that it does not vary along reduced to size 1."""
    for dim, size in enumerate(layer.shape):
        if size > 1:
            first = layer.narrow(dim, 0, 1)
            if layer.stride(dim) == 0 or torch.equal(layer.narrow(dim, 1, 1), first) and bool((layer == first).all()):
                layer = first
    return layer


def reduced(layer: torch.Tensor, dims: Iterable[int]) -> torch.Tensor:
    """The layer with these dimensions reduced to their first element."""
    for dim in dims:
        layer = layer.narrow(dim, 0, 1)
    return layer
