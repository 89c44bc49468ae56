"""What a criterion is, and how a user adds one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from hfprune.errors import ConfigError
from hfprune.granularity import parse_granularity
from hfprune.registry import Registry, did_you_mean

STATISTICS = (
    "gradient",
    "movement",
    "squared_gradient",
    "curvature",
    "synaptic_flow",
    "input_norm",
    "mean_activation",
    "active_fraction",
    "activation_entropy",
)
"""What a criterion may ask for beside the weight; at least float32, of a shape that broadcasts to the weight's:

- `gradient`: of the loss, averaged over calibration batches
- `movement`: the sum of weight times gradient over the training steps so far
- `squared_gradient`: E[g²] over single samples
- `curvature`: the diagonal of the Hessian of the loss, estimated with `probes` random vectors a batch
- `synaptic_flow`: dR/d|w|, R the sum of the outputs of the network with |w| on an input of ones; needs no data
- `input_norm`: ||x_j||₂ of what the element is multiplied with, over all tokens and positions
- `mean_activation`, `active_fraction`, `activation_entropy`: of that input's channel: the mean of |x|, the share of
  positions with x > 0, the entropy of its values in a histogram of `bins`
"""

WITHOUT_DATA = ("synaptic_flow",)
"""Statistics that need no calibration data."""

_OF_INPUTS = ("input_norm", "mean_activation", "active_fraction", "activation_entropy")
_OF_UNITS = ("channel", "head", "head_dim", "neuron", "width")


class Criterion:
    """Scores importance: the lowest go first.

    A unit's score is `finish` of the sum of `terms` over the unit's elements, so that one formula serves single
    weights, blocks and whole channels. Criteria of whole units give `units` instead.

    Attributes:
        name: under which it was registered.
        statistics: which of `STATISTICS` the terms need, in the order in which they are passed.
        pointwise: whether the terms of some elements depend on these elements alone; the others get whole layers.
        by_row: whether single weights are compared within their output row, of which every one loses the same number.
        of_units: whether it looks at whole units, through `units`; not for single weights, patterns, blocks of weights.
        of_blocks: whether it looks at whole residual blocks and scores no weights; for granularity `layer` alone.
        scores_components: whether it can score the components of a factored weight, from their singular values and the
            gradients of the loss by these as if they were weights; `of_components`: it can score nothing else.
        members: by which tensors of a coupled group it scores: its `weights` (where there are none, all), the weights
            of its `layers` (linear ones and convolutions), those of layers that take the group as their `inputs`, the
            scales of its `norms`, or `none`.
        layerwise: whether single weights and N:M are pruned layer after layer, each on what the pruned ones before it
            give (`criteria.layerwise.Layerwise`).
        batches: how many calibration batches feed the statistics.
        probes, bins: what `curvature` and `activation_entropy` are measured with.
    """

    name: str = ""
    statistics: ClassVar[tuple[str, ...]] = ()
    pointwise: ClassVar[bool] = True
    by_row: ClassVar[bool] = False
    of_units: ClassVar[bool] = False
    of_blocks: ClassVar[bool] = False
    scores_components: ClassVar[bool] = False
    of_components: ClassVar[bool] = False
    members: ClassVar[str] = "weights"
    probes: int = 8
    bins: int = 32
    layerwise: ClassVar[bool] = False

    def __init__(self, *, batches: int = 8, seed: int = 0):
        self.batches = count("batches", batches)
        self.seed = seed

    @property
    def needs_data(self) -> bool:
        """Whether it runs calibration batches through the model."""
        return self.of_blocks or any(statistic not in WITHOUT_DATA for statistic in self.statistics)

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

    def units(self, name: str, weight: torch.Tensor, *statistics: torch.Tensor) -> torch.Tensor:
        """The scores of whole units in one tensor of their group.

        Args:
            name: the tensor's name; the group's where `members` is `none`.
            weight: the units' parts of it, shape (units, elements); without elements where `members` is `none`.
            statistics: the same of what `statistics` asks for; where all of a unit's elements share a value, once.

        Returns:
            Shape (units,).
        """
        raise NotImplementedError


def count(key: str, value: Any, least: int = 1) -> int:
    """The value of a criterion's parameter that counts something.

    Raises:
        ConfigError: it is no whole number, or less than `least`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"pruning.criterion.{key}: {value!r} must be a whole number, at least {least}")
    return value


criteria: Registry[type[Criterion]] = Registry("criterion")


def register_criterion(name: str) -> Callable[[Any], Any]:
    """Enters a criterion of one's own under a name that a recipe can use.

    It is either a function of the weight, or a subclass of `Criterion`. A function gets whole layers; beside `weight`
    it may take any of `STATISTICS` by name, and parameters with defaults, which the recipe can set. It returns one term
    an element; a unit's score is their sum.

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
    criterion = kind(seed=seed, **parameters)
    criterion.name = name
    return criterion


def check_granularity(criterion: Criterion, name: str, granularities: list[str]) -> None:
    """Refuses units that the criterion can't score.

    Raises:
        ConfigError: one line that says which it can.
    """
    if "rank" in granularities and not criterion.scores_components:
        known = ", ".join(sorted(key for key in criteria if criteria[key].scores_components))
        raise ConfigError(f"pruning.criterion: '{name}' can't score the components of factored weights; known: {known}")
    other = [kind for kind in granularities if kind != "rank"]
    if criterion.of_components and other:
        raise ConfigError(
            f"pruning.criterion: '{name}' scores the components of factored weights, not '{other[0]}'; use it with "
            f"granularity: rank"
        )
    others = [kind for kind in granularities if kind != "layer"]
    if criterion.of_blocks and others:
        raise ConfigError(
            f"pruning.criterion: '{name}' scores whole blocks, not '{others[0]}'; use it with granularity: layer"
        )
    unfit = [kind for kind in granularities if kind not in _OF_UNITS]
    if criterion.of_units and unfit:
        raise ConfigError(
            f"pruning.criterion: '{name}' scores whole units of a layer, not '{unfit[0]}'; use it with granularity: "
            f"{', '.join(_OF_UNITS[:-1])} or {_OF_UNITS[-1]}"
        )
    coarse = [kind for kind in granularities if parse_granularity(kind).kind not in ("weight", "n:m")]
    if criterion.layerwise and not criterion.statistics and coarse:
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
    scored = "layers" if set(wanted) & set(_OF_INPUTS) else "weights"
    members = {"statistics": wanted, "pointwise": False, "members": scored, "__init__": __init__, "terms": terms}
    members["scores_components"] = set(wanted) <= {"gradient"}
    return type(name, (Criterion,), {**members, "__doc__": function.__doc__})
