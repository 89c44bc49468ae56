"""ShardedPruner: score and select where the weights are sharded, exactly as one process does that holds them whole.

Single weights, and N:M along rows, are scored where they lie. For what needs a layer as a whole (blocks, criteria that
look at all weights of a layer) one layer after another is gathered, and this process keeps its share of the scores.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hfprune.bits import PackedTensors
from hfprune.config import PruningConfig
from hfprune.errors import ConfigError
from hfprune.masks import MaskSet, ShardedMaskSet
from hfprune.pruner import Pruner
from hfprune.selection import LayerScores
from hfprune.sharding import AcrossProcesses, check_rows, joined, local, part_of, reshard, whole
from hfprune.units import block_sums, expand
from hfprune.weights import Weight

STATISTICS = ("gradient", "movement")
"""What can be gathered on shards."""


class ShardedPruner(Pruner):
    """A Pruner for a model that FSDP2 shards.

    It is made while the model is whole, and follows it when it is sharded. All processes call its methods together.

    Args:
        model, config, seed: as for Pruner.
        across: the processes.

    Raises:
        ConfigError: also for a criterion that needs whole tensors.
    """

    def __init__(self, model: nn.Module, config: PruningConfig, across: AcrossProcesses, seed: int = 0):
        super().__init__(model, config, seed)
        self.across = across
        if self.visits or self.by_row or not set(self.criterion.statistics) <= set(STATISTICS):
            raise ConfigError(
                f"pruning.criterion: '{config.criterion_name}' looks at whole layers while the model runs, and this "
                f"run shards them; use l1, l2, lamp, random, snip, taylor or movement, or prune in one process or "
                f"under DDP"
            )

    def follow(self, model: nn.Module) -> None:
        """Takes hold of the model's parameters as they are now.

        Raises:
            ConfigError: they are not dealt out by rows over all processes.
        """
        reshard(model)
        parameters = dict(model.named_parameters())
        for name, weight in self.weights.items():
            check_rows(name, parameters[name])
            self.weights[name] = replace(weight, parameter=parameters[name])
        self.model = model

    def select(self, target: float, masks: MaskSet | None = None, **given: Any) -> ShardedMaskSet:
        self.follow(self.model)
        found = super().select(target, masks, **given)
        reshard(self.model)
        return ShardedMaskSet(found.kept, self.model, self.across, self.pattern)

    def masks_of(self, gone: dict[str, torch.Tensor]) -> MaskSet:
        kept = PackedTensors()
        for name in list(gone):
            weight, stays = self.weights[name], gone.pop(name).logical_not_()
            if self.shape.kind == "block":
                full = expand(_shape_of(weight), self.across.joined(stays, self.units[name]), self.shape)
                kept[name] = part_of(full, weight.parameter)
            elif self.shape.kind == "n:m":
                kept[name] = stays.movedim(-1, weight.input_dim).contiguous()
            else:
                kept[name] = stays.view(local(weight.parameter).shape)
        return MaskSet(kept, self.pattern)

    def gone(self, masks: MaskSet) -> int:
        if self.shape.kind != "block":
            known = masks.sparsity()
            return sum(min(known[name].zeros, self.units[name]) for name in self.weights if name in known)
        return sum(int(self._gone_blocks(weight, masks).sum()) for n, weight in self.weights.items() if n in masks)

    def _gone_blocks(self, weight: Weight, masks: MaskSet) -> torch.Tensor:
        full = joined(masks.kept[weight.name], weight.parameter)
        return block_sums(_shape_of(weight), full.float(), self.shape) == 0

    def _layer_scores(self, weight: Weight, masks: MaskSet, statistics: tuple[torch.Tensor, ...]) -> LayerScores:
        name, gone = weight.name, masks.gone(weight.name)
        if self.shape.kind == "weight" and self.criterion.pointwise:
            return self._pointwise_scores(name, local(weight.parameter), statistics, gone, self.across)
        value, full = self._whole(weight, statistics)
        if self.shape.kind == "block":
            start, stop = self.across.share(self.units[name])
            scores = self._block_scores(_shape_of(weight), value, full)[start:stop].clone()
            gone = None if gone is None else self._gone_blocks(weight, masks)[start:stop].clone()
        else:
            scores = part_of(self._terms(weight, value, full, finish=True), weight.parameter).reshape(-1)
            gone = None if gone is None else gone.reshape(-1)
        limit = self.counts.limit(name)
        return LayerScores(name, len(scores), lambda a, b: scores[a:b], gone=gone, limit=limit, across=self.across)

    def _select_pattern(
        self, target: float, masks: MaskSet, statistics: dict[str, tuple[torch.Tensor, ...]]
    ) -> dict[str, torch.Tensor]:
        gone = {}
        for name, weight in self.weights.items():
            before = masks.gone(name)
            if weight.input_dim and self.criterion.pointwise:  # every group lies in a row
                with self.across.together():
                    scores = self._terms(weight, local(weight.parameter), statistics[name], finish=True)
                gone[name] = self._pattern(weight, scores, before, target, self.across)
                continue
            scores = self._terms(weight, *self._whole(weight, statistics[name]), finish=True)
            before = None if before is None else joined(before, weight.parameter)
            chosen = self._pattern(weight, scores, before, target).movedim(-1, weight.input_dim)
            gone[name] = weight.input_last(part_of(chosen.contiguous(), weight.parameter))
        return gone

    def _warn_of_whole(self, layers: list[LayerScores], gone: dict[str, torch.Tensor]) -> None:
        newly = self.across.sum(torch.tensor([int(gone[layer.name].sum()) for layer in layers])).tolist()
        self._warn_of_emptied([layer.name for layer, n in zip(layers, newly, strict=True)
                               if n > layer.already and n == self.units[layer.name]])  # fmt: skip

    def _whole(
        self, weight: Weight, statistics: Iterable[torch.Tensor]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """A weight and its statistics, gathered."""
        return whole(weight.parameter), tuple(joined(statistic, weight.parameter) for statistic in statistics)


def _shape_of(weight: Weight) -> Weight:
    """The weight with a parameter that has a shape and nothing else."""
    return replace(weight, parameter=nn.Parameter(torch.empty(weight.parameter.shape, device="meta")))
