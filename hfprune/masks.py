"""MaskSet: which elements of which parameters are kept zero."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from hfprune.errors import CheckpointError


class Sparsity(NamedTuple):
    """How sparse one tensor is: `zeros` of `numel` elements, in a `pattern` (`unstructured`, `2:4`, `block:4x4`)."""

    zeros: int
    numel: int
    pattern: str


class MaskSet:
    """Masks over a model's parameters: true is kept, false is held at zero.

    Example:
        >>> masks = MaskSet({"fc.weight": torch.tensor([[True, False]])}, pattern="unstructured")
        >>> masks.apply(model)          # zeros the masked elements
        >>> masks.enforce()             # after every optimizer step
        >>> masks.sparsity()["fc.weight"].zeros
        1
    """

    def __init__(self, kept: dict[str, torch.Tensor], pattern: str = "unstructured"):
        self.kept = dict(kept)
        self.pattern = pattern
        self._bound: list[nn.Parameter] = []
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
        return sum(int(mask.numel() - mask.sum()) for mask in self.kept.values())

    @property
    def numel(self) -> int:
        """How many elements the masked parameters have."""
        return sum(mask.numel() for mask in self.kept.values())

    def gone(self, name: str) -> torch.Tensor | None:
        """The elements of a parameter that are held at zero, or None where it has no mask."""
        return ~self.kept[name] if name in self.kept else None

    def sparsity(self) -> dict[str, Sparsity]:
        """The sparsity of every masked parameter, by name."""
        return {
            name: Sparsity(int(mask.numel() - mask.sum()), mask.numel(), self.pattern)
            for name, mask in self.kept.items()
        }

    def bind(self, model: nn.Module) -> MaskSet:
        """Takes hold of the model's parameters as they are now; `enforce` acts on these.

        Raises:
            CheckpointError: a masked parameter is not in the model or has another shape.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._bound, self._factors = [], []
        for name, mask in self.kept.items():
            parameter = parameters.get(name)
            if parameter is None or parameter.shape != mask.shape:
                found = "is not there" if parameter is None else f"has the shape {tuple(parameter.shape)}"
                raise CheckpointError(f"the mask of '{name}' {tuple(mask.shape)} does not fit: the parameter {found}")
            self.kept[name] = mask.to(parameter.device)
            self._bound.append(parameter)
            self._factors.append(_factor(self.kept[name], parameter))
        return self

    @torch.no_grad()
    def enforce(self) -> None:
        """Sets what is masked to zero again in the bound parameters, in one fused call."""
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
            parameter.masked_fill_(~mask, 0.0)

    def digest(self) -> str:
        """A hash over all masks and their names: equal if and only if the masks are."""
        total = hashlib.sha256()
        for name in sorted(self.kept):
            total.update(f"{name}:{mask_hash(~self.kept[name])}\n".encode())
        return total.hexdigest()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The masks packed to one bit an element, for a safetensors file."""
        return {name: pack_bits(mask) for name, mask in self.kept.items()}

    @classmethod
    def from_state_dict(cls, packed: dict[str, torch.Tensor], model: nn.Module, pattern: str) -> MaskSet:
        """The inverse of `state_dict`; the shapes are those of the model's parameters."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name in packed:
            if name not in parameters:
                raise CheckpointError(f"a mask was saved for '{name}', which the model does not have")
        return cls({name: unpack_bits(bits, parameters[name].shape) for name, bits in packed.items()}, pattern)

    @classmethod
    def from_zeros(cls, model: nn.Module, names: list[str], pattern: str) -> MaskSet:
        """The masks that a pruned model's own zeros say, for the named parameters."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return cls({name: parameters[name].detach() != 0 for name in names if name in parameters}, pattern)


def _factor(mask: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """What the parameter is multiplied with: on a GPU of its own dtype, which the fused kernel needs."""
    return mask.to(parameter.dtype) if parameter.device.type == "cuda" else mask


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """A bool tensor of any shape as bytes, eight elements each, the first in the highest bit; on the CPU."""
    bits = mask.detach().flatten().cpu().to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    packed = torch.zeros(len(bits), dtype=torch.uint8)
    for place in range(8):
        packed |= bits[:, place] << (7 - place)
    return packed


def unpack_bits(packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse of `pack_bits`.

    Raises:
        CheckpointError: the bytes are not those of a mask of that shape.
    """
    count = shape.numel()
    if packed.dtype != torch.uint8 or len(packed) != -(-count // 8):
        raise CheckpointError(f"{len(packed)} bytes can't be a mask of shape {tuple(shape)}")
    bits = torch.stack([(packed >> (7 - place)) & 1 for place in range(8)], dim=1)
    return bits.flatten()[:count].view(shape).bool()


def mask_hash(zeros: torch.Tensor) -> str:
    """The sha-256 of a pattern of zeros: the shape, then `pack_bits` of where the zeros are."""
    digest = hashlib.sha256(",".join(str(n) for n in zeros.shape).encode())
    digest.update(pack_bits(zeros).numpy().tobytes())
    return digest.hexdigest()
