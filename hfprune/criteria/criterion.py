"""What a criterion is, and how a user adds one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from hfprune.errors import ConfigError
from hfprune.granularity import parse_granularity
from hfprune.registry import Registry, did_you_mean

STATISTICS = ("gradient", "movement")
"""What a criterion may ask for beside the weight: the loss gradient averaged over calibration batches, and the sum of
weight times gradient over the training steps so far. Both are float32 tensors of the weight's shape."""


class Criterion:
    """Scores importance: the lowest go first.

    A unit's score is `finish` of the sum of `terms` over the unit's elements, so that one formula serves single
    weights, blocks and whole channels.

    Attributes:
        statistics: which of `STATISTICS` the terms need, in the order in which they are passed.
        pointwise: whether the terms of some elements depend on these elements alone; the others get whole layers.
        of_blocks: whether it looks at whole residual blocks and scores no weights; for granularity `layer` alone.
        layerwise: whether it prunes layer after layer, each on what the pruned ones before it give, instead of giving
            scores (`criteria.layerwise.Layerwise`); for granularities `weight` and N:M alone.
        batches: how many calibration batches feed the statistics.
    """

    statistics: ClassVar[tuple[str, ...]] = ()
    pointwise: ClassVar[bool] = True
    of_blocks: ClassVar[bool] = False
    layerwise: ClassVar[bool] = False

    def __init__(self, *, batches: int = 8, seed: int = 0):
        if not isinstance(batches, int) or isinstance(batches, bool) or batches < 1:
            raise ConfigError(f"pruning.criterion.batches: {batches!r} must be a whole number, at least 1")
        self.batches = batches
        self.seed = seed

    def terms(self, name: str, weight: torch.Tensor, *statistics: torch.Tensor) -> torch.Tensor:
        """What each element adds to its unit's score.

        Args:
            name: the weight's name.
            weight: the weight, or for a pointwise criterion any part of it, flat.
            statistics: the same part of what `statistics` asks for.

        Returns:
            A tensor of the weight's shape.
        """
        raise NotImplementedError

    def finish(self, total: torch.Tensor) -> torch.Tensor:
        """A unit's score from the sum of its terms."""
        return total


criteria: Registry[type[Criterion]] = Registry("criterion")


def register_criterion(name: str) -> Callable[[Any], Any]:
    """Enters a criterion of one's own under a name that a recipe can use.

    It is either a function of the weight, or a subclass of `Criterion`. A function gets whole layers; beside `weight`
    it may take `gradient` and `movement` (see `STATISTICS`), and parameters with defaults, which the recipe can set. It
    returns one term an element; a unit's score is their sum.

    Example:
        >>> @hfprune.register_criterion("centred")
        ... def centred(weight, power=1.0):
        ...     return (weight - weight.mean()).abs() ** power
        >>> hfprune.prune(model, hfprune.PruningConfig(criterion={"name": "centred", "power": 2.0}, target=0.5))

    Raises:
        ConfigError: the name is taken, or the function asks for something unknown.
    """

    def enter(entry: Any) -> Any:
        is_class = inspect.isclass(entry) and issubclass(entry, Criterion)
        criteria.register(name)(entry if is_class else _from_function(name, entry))
        return entry

    return enter


def create(name: str, parameters: dict[str, Any] | None = None, seed: int = 0) -> Criterion:
    """The criterion of that name.

    Raises:
        ConfigError: an unknown name, or a parameter that the criterion does not take.
    """
    try:
        kind = criteria[name]
    except ConfigError as error:
        raise ConfigError(f"pruning.criterion: {error}") from error
    parameters = dict(parameters or {})
    known = _parameter_names(kind)
    for key in parameters:
        if key not in known:
            raise ConfigError(f"pruning.criterion.{key}: '{name}' takes no such parameter; {did_you_mean(key, known)}")
    return kind(seed=seed, **parameters)


def check_granularity(criterion: Criterion, name: str, granularities: list[str]) -> None:
    """Refuses units that the criterion can't score.

    Raises:
        ConfigError: one line that says which it can.
    """
    others = [kind for kind in granularities if kind != "layer"]
    if criterion.of_blocks and others:
        raise ConfigError(
            f"pruning.criterion: '{name}' scores whole blocks, not '{others[0]}'; use it with granularity: layer"
        )
    coarse = [kind for kind in granularities if parse_granularity(kind).kind not in ("weight", "n:m")]
    if criterion.layerwise and coarse:
        raise ConfigError(
            f"pruning.criterion: '{name}' prunes single weights, not '{coarse[0]}'; "
            f"use it with granularity: weight, or N:M such as 2:4"
        )


def _parameter_names(kind: type[Criterion]) -> list[str]:
    names: list[str] = []
    for owner in kind.__mro__:
        if "__init__" in vars(owner) and owner is not object:
            names += [p.name for p in inspect.signature(owner.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return sorted({name for name in names if name != "seed"})


def _from_function(name: str, function: Callable[..., torch.Tensor]) -> type[Criterion]:
    """A criterion class around a function of the weight."""
    arguments = list(inspect.signature(function).parameters.values())
    wanted = tuple(a.name for a in arguments if a.name in STATISTICS)
    own = {a.name: a.default for a in arguments if a.name not in STATISTICS and a.name != "weight"}
    for key, default in own.items():
        if default is inspect.Parameter.empty:
            raise ConfigError(f"criterion '{name}': the parameter '{key}' needs a default; known: weight, {STATISTICS}")

    def __init__(self: Criterion, **parameters: Any) -> None:
        Criterion.__init__(self, **{k: v for k, v in parameters.items() if k not in own})
        self.own = own | {k: v for k, v in parameters.items() if k in own}

    def terms(self: Criterion, layer: str, weight: torch.Tensor, *statistics: torch.Tensor) -> torch.Tensor:
        scores = function(weight=weight, **dict(zip(wanted, statistics, strict=True)), **self.own)
        if not isinstance(scores, torch.Tensor) or scores.shape != weight.shape:
            shape = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
            raise ConfigError(f"criterion '{name}': returned {shape} for '{layer}' of shape {tuple(weight.shape)}")
        return scores

    keyword = inspect.Parameter.KEYWORD_ONLY
    __init__.__signature__ = inspect.Signature([inspect.Parameter(key, keyword) for key in own])
    members = {"statistics": wanted, "pointwise": False, "__init__": __init__, "terms": terms}
    return type(name, (Criterion,), {**members, "__doc__": function.__doc__})
