"""MaskSet: which elements of which parameters are kept zero."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import nn

from hfprune.bits import PackedTensors, mask_hash, unpack_bits
from hfprune.errors import CheckpointError
from hfprune.sharding import AcrossProcesses, joined, local, part_of, reshard


class Sparsity(NamedTuple):
    """How sparse one tensor is: `zeros` of `numel` elements, in a `pattern` (`unstructured`, `2:4`, `block:4x4`)."""

    zeros: int
    numel: int
    pattern: str


class MaskSet:
    """Masks over a model's parameters: true is kept, false is held at zero.

    They are held at one bit an element (`kept`); `enforce` makes what it multiplies with when it is first called.

    Example:
        >>> masks = MaskSet({"fc.weight": torch.tensor([[True, False]])}, pattern="unstructured")
        >>> masks.apply(model)          # zeros the masked elements
        >>> masks.enforce()             # after every optimizer step
        >>> masks.sparsity()["fc.weight"].zeros
        1
    """

    def __init__(self, kept: Mapping[str, torch.Tensor], pattern: str = "unstructured"):
        self.kept = PackedTensors(kept)
        self.pattern = pattern
        self._bound: list[torch.Tensor] = []
        self._factors: list[torch.Tensor] = []

    def __len__(self) -> int:
        return len(self.kept)

    def __contains__(self, name: object) -> bool:
        return name in self.kept

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    @property
    def zeros(self) -> int:
        """How many elements are held at zero, over all parameters."""
        return sum(self.kept.numel(name) - self.kept.count(name) for name in self.kept)

    @property
    def numel(self) -> int:
        """How many elements the masked parameters have."""
        return sum(self.kept.numel(name) for name in self.kept)

    def gone(self, name: str) -> torch.Tensor | None:
        """The elements of a parameter that are held at zero, or None where it has no mask."""
        return self.kept[name].logical_not_() if name in self.kept else None

    def sparsity(self) -> dict[str, Sparsity]:
        """The sparsity of every masked parameter, by name."""
        kept = self.kept
        return {name: Sparsity(kept.numel(name) - kept.count(name), kept.numel(name), self.pattern) for name in kept}

    def bind(self, model: nn.Module) -> MaskSet:
        """Takes hold of the model's parameters as they are now; `enforce` acts on these, or on the parts that lie here.

        Raises:
            CheckpointError: a masked parameter is not in the model or has another shape.
        """
        reshard(model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._bound, self._factors = [], []
        for name in self.kept:
            parameter, shape = parameters.get(name), self.kept.packed(name).shape
            parameter = None if parameter is None else local(parameter)
            if parameter is None or parameter.shape != shape:
                found = "is not there" if parameter is None else f"has the shape {tuple(parameter.shape)}"
                raise CheckpointError(f"the mask of '{name}' {tuple(shape)} does not fit: the parameter {found}")
            self.kept.move(name, parameter.device)
            self._bound.append(parameter)
        return self

    @torch.no_grad()
    def enforce(self) -> None:
        """Sets what is masked to zero again in the bound parameters, in one fused call."""
        if not self._factors:
            bound = zip(self.kept.values(), self._bound, strict=False)
            self._factors = [_factor(mask, parameter) for mask, parameter in bound]
        if self._bound:
            torch._foreach_mul_(self._bound, self._factors)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> MaskSet:
        """Binds the model and zeroes what is masked, as +0.0 whatever stood there before."""
        self.bind(model)
        self.clean()
        return self

    @torch.no_grad()
    def clean(self) -> None:
        """Makes every masked element +0.0, where `enforce` may leave -0.0 or the product of an infinity."""
        for parameter, mask in zip(self._bound, self.kept.values(), strict=True):
            parameter.masked_fill_(mask.logical_not_(), 0.0)

    def digest(self) -> str:
        """A hash over all masks and their names: equal if and only if the masks are."""
        total = hashlib.sha256()
        for name in sorted(self.kept):
            total.update(f"{name}:{mask_hash(self.gone(name))}\n".encode())
        return total.hexdigest()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The masks packed to one bit an element, for a safetensors file."""
        return {name: self.kept.packed(name).bits.cpu() for name in self.kept}

    @classmethod
    def from_state_dict(cls, packed: dict[str, torch.Tensor], model: nn.Module, pattern: str) -> MaskSet:
        """The inverse of `state_dict`; the shapes are those of the model's parameters."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name in packed:
            if name not in parameters:
                raise CheckpointError(f"a mask was saved for '{name}', which the model does not have")
        kept = PackedTensors()
        for name, bits in packed.items():
            kept[name] = unpack_bits(bits, parameters[name].shape)
        return cls(kept, pattern)

    @classmethod
    def from_zeros(cls, model: nn.Module, names: list[str], pattern: str) -> MaskSet:
        """The masks that a pruned model's own zeros say, for the named parameters."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return cls({name: parameters[name].detach() != 0 for name in names if name in parameters}, pattern)


class ShardedMaskSet(MaskSet):
    """The masks of a model whose parameters are sharded: every process holds those of its own parts.

    What is counted is counted over all processes. They make it together.

    Args:
        kept: the masks of the parts that lie here.
        model: the sharded model.
        across: its processes.
        pattern: as in MaskSet.
    """

    def __init__(
        self, kept: Mapping[str, torch.Tensor], model: nn.Module, across: AcrossProcesses, pattern: str = "unstructured"
    ):
        super().__init__(kept, pattern)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._like = {name: parameters[name] for name in self.kept}
        counts = across.sum(torch.tensor([self.kept.count(name) for name in self.kept], dtype=torch.int64))
        self._count = dict(zip(self.kept, counts.tolist(), strict=True))

    @classmethod
    def of_whole(cls, masks: MaskSet, model: nn.Module, across: AcrossProcesses) -> ShardedMaskSet:
        """The parts of whole masks that belong to the parts of the model that lie here."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        parts = PackedTensors()
        for name in masks:
            parts[name] = part_of(masks.kept[name], parameters[name])
        return cls(parts, model, across, masks.pattern)

    @property
    def zeros(self) -> int:
        return sum(found.zeros for found in self.sparsity().values())

    @property
    def numel(self) -> int:
        return sum(parameter.numel() for parameter in self._like.values())

    def sparsity(self) -> dict[str, Sparsity]:
        sizes = {name: parameter.numel() for name, parameter in self._like.items()}
        return {name: Sparsity(size - self._count[name], size, self.pattern) for name, size in sizes.items()}

    def joined(self, keep: bool) -> MaskSet:
        """The whole masks, gathered one after another by all processes together; for those that `keep` them."""
        whole = PackedTensors()
        for name in self.kept:
            full = joined(self.kept[name], self._like[name])
            if keep:
                whole[name] = full.cpu()
        return MaskSet(whole, self.pattern)


def _factor(mask: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """What the parameter is multiplied with: on a GPU of its own dtype, which the fused kernel needs."""
    return mask.to(parameter.dtype) if parameter.device.type == "cuda" else mask
