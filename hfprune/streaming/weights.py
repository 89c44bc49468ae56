"""Single weights, N:M and blocks by criteria that look at the weights alone: one tensor at a time is held."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from hfprune.config import PruningConfig
from hfprune.errors import ConfigError, and_more
from hfprune.masks import MaskSet
from hfprune.pruner import Pruner
from hfprune.selection import LayerScores, select_in_turn
from hfprune.streaming.source import Source
from hfprune.weights import Weight

NOTHING = MaskSet({})


class StreamedPruner(Pruner):
    """A Pruner whose weights lie in files; what goes is bit for bit what a Pruner selects.

    Args:
        source: the checkpoint.
        config: what to prune.

    Raises:
        ConfigError: also for a criterion that needs more than the weights.
    """

    def __init__(self, source: Source, config: PruningConfig):
        super().__init__(source.model, config)
        self.source = source
        self._held: tuple[str, LayerScores] | None = None
        if (self.criterion.statistics or self.criterion.layerwise) and not self.visits:
            raise ConfigError(
                f"pruning.criterion: '{config.criterion_name}' needs the whole model in memory; with streaming use l1, "
                f"l2, lamp or random, or wanda or sparsegpt for single weights and N:M"
            )
        for name in self.weights:
            source.place(name)

    def in_turn(self, target: float) -> Iterator[tuple[str, torch.Tensor]]:
        """The masks at a target, one weight after another: its name, and true for what is kept, in its shape.

        Raises:
            ModelError: a score that is not a number.
        """
        emptied = []
        for name, units in self._gone(target):
            if bool(units.all()) and units.numel():
                emptied.append(name)
            self._held = None  # the mask takes its room
            kept = self.masks_of({name: units}).kept
            yield name, kept[name]
        if emptied:
            which, by = f"'{emptied[0]}'{and_more(emptied)}", self.config.criterion_name
            hint = "min_kept keeps a part of every layer"
            warnings.warn(f"pruning.criterion: '{by}' removes all of {which}; {hint}", stacklevel=3)

    def gone_in(self, name: str, zeros: torch.Tensor) -> int:
        """How many units of a weight are gone, by where its zeros are; of blocks only whole ones count."""
        with self.only([name]):
            return self.gone(MaskSet({name: zeros.logical_not()}, self.pattern))

    def _gone(self, target: float) -> Iterator[tuple[str, torch.Tensor]]:
        """The units that go, one weight after another."""
        together = []
        for name, weight in self.weights.items():
            if self.shape.kind == "n:m":
                with self.only([name]):
                    self.weights[name] = self._real(weight)
                    gone = self._select_pattern(target, NOTHING, {name: ()})
                yield name, gone[name]
            elif self.config.scope == "layer" or name in self.counts.own_ratio:
                yield from self._select_units(target, [self._layer_scores(weight, NOTHING, ())]).items()
            else:
                together.append(self._layer_scores(weight, NOTHING, ()))
        if together:
            yield from select_in_turn(together, round(target * sum(layer.units for layer in together)))

    def _layer_scores(self, weight: Weight, masks: MaskSet, statistics: tuple[torch.Tensor, ...]) -> LayerScores:
        """Scores that are made from the file whenever they are asked for; those of one weight at a time are held."""
        name = weight.name

        def scores(start: int, stop: int) -> torch.Tensor:
            if self._held is None or self._held[0] != name:
                self._held = None
                self._held = name, super(StreamedPruner, self)._layer_scores(self._real(weight), masks, statistics)
            return self._held[1].scores(start, stop)

        return LayerScores(name, self.units[name], scores, limit=self.counts.limit(name))

    def _real(self, weight: Weight) -> Weight:
        return replace(weight, parameter=nn.Parameter(self.source.read(weight.name), requires_grad=False))
