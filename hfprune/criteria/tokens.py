"""Tokens: which positions of a batch are real ones, and which are padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hfprune.criteria.layers import Layer


class Tokens:
    """Which positions of a batch are real ones, by its attention masks."""

    def __init__(self, model: nn.Module, batch: Any):
        given = batch[0] if isinstance(batch, list | tuple) else batch
        given = given if isinstance(given, Mapping) else {}
        mask = given.get("attention_mask")
        self.own = _flags(mask)
        self.later = None
        self.decoding: set[nn.Module] = set()
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            self.decoding = set(model.get_decoder().modules())
            labels = given.get("labels")
            self.later = _flags(given.get("decoder_attention_mask"))
            if self.later is None and labels is not None:
                self.later = _flags(labels != -100)

    def real(self, layer: Layer, seen: torch.Tensor, shared: bool) -> torch.Tensor:
        """The inputs of a layer without those at padded positions.

        Args:
            layer: which sees them; convolutions see all.
            seen: (..., features).
            shared: whether the tensor is one that all blocks of a decoder are given, which is the encoder's.
        """
        flags = [self.own]
        if layer.module in self.decoding:
            flags = [self.own, self.later] if shared else [self.later, self.own]
        for flag in flags:
            if flag is None or layer.groups > 1 or hasattr(layer.module, "kernel_size"):
                continue
            if seen.ndim > 2 and seen.shape[:2] == flag.shape:
                return seen[flag.to(seen.device)]
            if seen.ndim == 2 and len(seen) == flag.numel():
                return seen[flag.to(seen.device).flatten()]
        return seen


def _flags(mask: Any) -> torch.Tensor | None:
    """A mask of (batch, tokens) as bool; None for none, and for any other form, which only the model understands."""
    return mask != 0 if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
