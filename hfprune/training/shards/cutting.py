"""Removal from a sharded model: every process maps all of it from a file, cuts it alike, and keeps its own rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hfprune.config import PruningConfig
from hfprune.errors import ConfigError
from hfprune.sharding import joined, local
from hfprune.training.removal import AgreedPruner, Removal, example_of, shapes_of
from hfprune.training.shards.whole import empty_out, fill, gathering
from hfprune.weights import Weight

if TYPE_CHECKING:
    from hfprune.training.shards.trainer import Shards
    from hfprune.training.trainer import PruningTrainer


class ShardedRemoval(Removal):
    """Removal from a model that FSDP2 shards; the shards' skeleton is what is cut, and proved, on the CPU.

    Raises:
        ConfigError: also for what shards can't be followed with.
    """

    def __init__(self, trainer: PruningTrainer):
        if trainer.optimizer is not None:
            raise ConfigError(
                "optimizers: an optimizer of your own can't follow where this run shards the model and units are "
                "removed; leave it out, and name it in the arguments"
            )
        self.shards = shards = trainer.shards
        fill(shards.skeleton, trainer.model, shards.across, True, shards.folder)
        super().__init__(trainer)
        empty_out(shards.skeleton)

    def _pruner_of(self, trainer: PruningTrainer) -> ShardedUnitPruner:
        return ShardedUnitPruner(self.shards, trainer.pruning, example_of(trainer), seed=trainer.args.seed)

    @property
    def model(self) -> nn.Module:
        return self.shards.skeleton

    @contextmanager
    def cutting(self) -> Iterator[None]:
        shards, restore = self.shards, self.pruner.restore_point()
        with shards.cutting():
            try:
                with shards.across.together():
                    yield
            except BaseException:
                restore()
                raise
            # What is cut lies in memory: it goes to a file too.
            fill(shards.skeleton, shards.skeleton, shards.across, True, shards.folder)
            self.pruner.settle()

    def load(self, state: dict[str, Any] | None) -> None:
        before = shapes_of(self.model)
        super().load(state)
        if shapes_of(self.model) != before:
            self.shards.begin_anew()


class ShardedUnitPruner(AgreedPruner):
    """An AgreedPruner that looks at a sharded model's skeleton, and takes gradients from the shards.

    Args:
        shards: of the model; their skeleton has values while it is looked at.
        config, example_inputs, seed: as for StructuredPruner.

    Raises:
        ConfigError: also for what only a whole model can tell while it runs.
    """

    def __init__(self, shards: Shards, config: PruningConfig, example_inputs: Any, seed: int):
        self.shards = shards
        super().__init__(shards.skeleton, config, example_inputs, seed=seed)
        if tuple(self.criterion.statistics) != (("gradient",) if self.needs_data else ()):
            raise ConfigError(
                f"pruning.criterion: '{config.criterion_name}' looks at whole layers while the model runs, and this "
                f"run shards them; use l1, l2, lamp, random, bn_scale, fpgm, fermat, snip or taylor, or prune in one "
                f"process or under DDP"
            )
        if config.target.kind == "latency":
            raise ConfigError(
                "pruning.target.latency: the whole model would have to run where it is timed, and this run shards it; "
                "use macs or params, or prune in one process or under DDP"
            )

    def _statistics(
        self, model: nn.Module, weights: dict[str, Weight], given: dict[str, Any]
    ) -> dict[str, tuple[torch.Tensor, ...]]:
        if not self.needs_data:
            return super()._statistics(model, weights, given)
        shards, sharded = self.shards, self.shards.trainer.model
        named = dict(sharded.named_parameters(remove_duplicate=False))
        parts = super()._statistics(
            sharded, {name: replace(weight, parameter=named[name]) for name, weight in weights.items()}, given
        )
        # A process without rows of a weight may have none of its gradient.
        took_part = shards.across.sum(torch.tensor([int(name in parts) for name in weights])).tolist()
        with gathering(shards.across, True, shards.folder) as add:
            found = {}
            for name, count in zip(weights, took_part, strict=True):
                if count:
                    (part,) = parts.get(name) or (torch.zeros_like(local(named[name])),)
                    found[name] = (add(joined(part, named[name])),)
        return found
