"""Counts: how many units of every layer go at each target, and whether the target can be reached."""

from __future__ import annotations

import math
import warnings

from hfprune.config import PruningConfig
from hfprune.criteria.layerwise import Goal, shares
from hfprune.errors import ConfigError, and_more
from hfprune.granularity import Granularity
from hfprune.masks import MaskSet
from hfprune.weights import Weight, pattern_for


class Counts:
    """What a configuration's ratios come to in units.

    Args:
        config: scope, target, `per_layer` and `min_kept`.
        weights: what is pruned, by name.
        units: how many units each has.
        shape: the granularity.
        by_row: whether every row loses the same number, and with that every layer the same fraction.

    Raises:
        ConfigError: a target that can't be reached.
    """

    def __init__(
        self,
        config: PruningConfig,
        weights: dict[str, Weight],
        units: dict[str, int],
        shape: Granularity,
        by_row: bool,
    ):
        self.config, self.weights, self.units, self.shape, self.by_row = config, weights, units, shape, by_row
        self.own_ratio = {
            name: config.per_layer[pattern]
            for name in weights
            if (pattern := pattern_for(name, config.per_layer)) is not None
        }
        self._check_reachable()

    def wanted(self, target: float) -> int:
        """How many units are gone in all at a cumulative target, by scope, layers' own ratios and exact rounding."""
        rest = [name for name in self.weights if name not in self.own_ratio]
        own = sum(self.own(name, target) for name in self.own_ratio)
        if self.config.scope == "layer" or self.shape.kind == "n:m":
            return own + sum(self.layer(name, target) for name in rest)
        return own + round(target * sum(self.units[name] for name in rest))

    def goals(self, target: float, masks: MaskSet) -> dict[str, Goal]:
        """How much of every layer goes; of a total over all layers each gives its share."""
        already = {name: found.zeros for name, found in masks.sparsity().items()}
        if self.shape.kind == "n:m":
            whole = target >= self.config.ratio
            counts = {name: self.layer(name, target) for name in self.weights}
            return {name: Goal(count, self.shape.kept, self.shape.group, whole) for name, count in counts.items()}
        counts = {name: self.own(name, target) for name in self.own_ratio}
        rest = [name for name in self.weights if name not in self.own_ratio]
        if self.config.scope == "layer":
            counts |= {name: self.layer(name, target) for name in rest}
        else:
            sizes, least = [self.units[name] for name in rest], [already.get(name, 0) for name in rest]
            most = [max(self.limit(name), already.get(name, 0)) for name in rest]
            total = round(target * sum(sizes))
            counts |= dict(zip(rest, shares(total, sizes, least, most), strict=True))
        bounds = {name: max(self.limit(name), already.get(name, 0)) for name in counts}
        return {name: Goal(min(max(count, already.get(name, 0)), bounds[name])) for name, count in counts.items()}

    def _check_reachable(self) -> None:
        if sum(self.units.values()) == 0:
            raise ConfigError(
                f"pruning.granularity: no layer's input dimension holds a group of {self.shape.group}, so nothing of "
                f"'{self.config.granularity}' can be pruned"
            )
        for name, ratio in self.own_ratio.items():
            if round(ratio * self.units[name]) > self.limit(name):
                raise ConfigError(f"pruning.per_layer: {ratio} for '{name}' removes more than min_kept allows")
        rest = [name for name in self.weights if name not in self.own_ratio]
        limits = sum(self.limit(name) for name in rest)
        wanted = round(self.config.ratio * sum(self.units[name] for name in rest))
        if self.config.scope == "global" and wanted > limits:
            reachable = math.floor(limits / sum(self.units[name] for name in rest) * 1e4) / 1e4
            raise ConfigError(
                f"pruning.target.ratio: {self.config.ratio} can't be reached with min_kept {self.config.min_kept}; "
                f"at most {reachable}"
            )
        if self.config.scope == "layer" or self.by_row:
            for name in rest:
                if round(self.config.ratio * self.units[name]) > self.limit(name):
                    raise ConfigError(
                        f"pruning.min_kept: {self.config.min_kept} keeps more of '{name}' ({self.units[name]} units) "
                        f"than the ratio {self.config.ratio} does; use "
                        + ("a smaller one" if self.by_row else "scope: global, or a smaller one")
                    )
        if self.shape.kind == "block":
            self._check_blocks()

    def _check_blocks(self) -> None:
        """Refuses blocks so large that a layer goes as a whole, and warns where one may."""
        blocks, final = f"pruning.granularity: '{self.config.granularity}' is too large", self.config.ratio
        by_layer = self.weights if self.config.scope == "layer" else self.own_ratio
        for name in by_layer:
            units, ratio = self.units[name], self.own_ratio.get(name, final)
            if 0 < units == round(ratio * units):
                raise ConfigError(f"{blocks}: a ratio of {ratio} empties '{name}', that is {units} of them")
        rest = [name for name in self.weights if name not in by_layer]
        single = [name for name in rest if self.units[name] == self.limit(name) == 1]
        if not single or not final:
            return
        more = and_more(single)
        if round(final * sum(self.units[n] for n in rest)) > sum(min(self.limit(n), self.units[n] - 1) for n in rest):
            raise ConfigError(
                f"{blocks}: '{single[0]}'{more} is one of them, and a ratio of {final} must empty a layer"
            )
        warnings.warn(
            f"{blocks}: '{single[0]}'{more} is one of them, which stays or goes as a whole; min_kept: 1 keeps it",
            stacklevel=5,
        )

    def limit(self, name: str) -> int:
        """The most units of a layer that may go."""
        least = self.config.min_kept
        kept = least if isinstance(least, int) else math.ceil(least * self.units[name])
        return max(0, self.units[name] - kept)

    def own(self, name: str, target: float) -> int:
        """The count of a layer with a ratio of its own; it grows along the schedule as the target does."""
        final = self.config.ratio
        return round(self.own_ratio[name] * (target / final if final else 1.0) * self.units[name])

    def layer(self, name: str, target: float) -> int:
        return round(target * self.units[name])
