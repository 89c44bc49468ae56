"""How transformers expands sparse tensors while it loads them: the one place that uses its weight converters."""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter

from hfprune.checkpoint.bitmask import SUFFIXES, unpack
from hfprune.checkpoint.foreign import LEGACY, LEGACY_PARTS, OFFSETS, expand_legacy
from hfprune.errors import CheckpointError


class Expand(ConversionOps):
    """Two parts of a sparse tensor become the tensor."""

    def __init__(self, encoding: str):
        self.encoding = encoding

    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: torch.nn.Module, **_: Any
    ) -> dict[str, torch.Tensor]:
        """One dense tensor under its name, with the shape that the model has for it."""
        parts = [_single(input_dict.get(end)) for end in SUFFIXES[self.encoding]]
        if any(part is None for part in parts):
            raise CheckpointError(f"the sparse tensor '{full_layer_name}' lacks one of its parts")
        owner, _, leaf = full_layer_name.rpartition(".")
        shape = tuple(getattr(model.get_submodule(owner), leaf).shape)
        return {full_layer_name: unpack(*parts, shape, self.encoding)}

    @property
    def reverse_op(self) -> ConversionOps:
        raise CheckpointError("a model is stored sparse by hfprune.save_pretrained(..., sparse=True)")


class ExpandLegacy(Expand):
    """The parts of a tensor that compressed-tensors wrote become the tensor."""

    def __init__(self):
        super().__init__(LEGACY)

    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: torch.nn.Module, **_: Any
    ) -> dict[str, torch.Tensor]:
        """One dense tensor under its name."""
        values, bits, shape = (_single(input_dict.get(part)) for part in LEGACY_PARTS)
        if values is None or bits is None or shape is None:
            raise CheckpointError(f"the sparse tensor '{full_layer_name}' lacks one of its parts")
        if values.is_meta:
            return {full_layer_name: torch.empty_like(model.get_parameter(full_layer_name), dtype=values.dtype)}
        return {full_layer_name: expand_legacy(values, bits, shape)}


def expanders(legacy: bool) -> list[WeightConverter]:
    """One converter an encoding, or that of `legacy` files; what is not stored sparse passes by."""
    if legacy:
        return [WeightConverter([*LEGACY_PARTS, OFFSETS], [".weight"], [ExpandLegacy()])]
    return [WeightConverter(list(ends), [""], [Expand(encoding)]) for encoding, ends in SUFFIXES.items()]


def forget_expanders(model: Any) -> None:
    """Leaves the model to be saved as any other: transformers would turn its converters around."""
    known = getattr(model, "_weight_conversions", None)
    if known:
        model._weight_conversions = [
            c for c in known if not any(isinstance(op, Expand) for op in getattr(c, "operations", ()))
        ]


def _single(part: Any) -> torch.Tensor | None:
    return part[0] if isinstance(part, list) and len(part) == 1 else None
