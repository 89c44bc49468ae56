"""PruningConfig: what to prune, by how much, when, and how to recover; also the recipe's `pruning:` section."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from hfprune import schedules
from hfprune.drop import Drop, points
from hfprune.errors import ConfigError
from hfprune.granularity import STRUCTURAL, parse_granularity
from hfprune.registry import did_you_mean
from hfprune.strategy import Ice
from hfprune.strict import Patterns, Ratio, StrictModel
from hfprune.target import Target


class Schedule(StrictModel):
    """In how many steps, and how large each is (`hfprune.schedules`).

    Attributes:
        kind: `one_shot`, `constant`, `geometric`, `cubic` or `hybrid`; `auto` leaves the choice to
            `schedules.advise`, once the model is known. Without training it is `one_shot`.
        steps: the number of steps (hybrid: after its first); 1 for one_shot, by default 5 otherwise (hybrid: 3).
        first: hybrid only: the fraction removed in the first step; by default three quarters of the ratio.
        largest_step: instead of `steps`: as many geometric steps as keep each within this fraction of what remains.
        every: prune inside one training run, every so many optimizer steps, instead of between phases.
    """

    kind: str = "one_shot"
    steps: Annotated[int, Field(ge=1, le=10_000)] | None = None
    first: Ratio | None = None
    largest_step: Annotated[float, Field(ge=1e-3, lt=1)] | None = None
    every: Annotated[int, Field(ge=1)] | None = None

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in (known := [*schedules.schedules, schedules.AUTO]):
            raise ValueError(f"unknown schedule '{kind}'; {did_you_mean(kind, known)}")
        return kind

    @model_validator(mode="after")
    def _consistent(self) -> Schedule:
        if self.kind == "one_shot" and (self.steps or 1) > 1:
            raise ValueError(f"steps: one_shot has one step, not {self.steps}; use geometric or constant for several")
        if self.largest_step is not None and self.kind not in ("geometric", "hybrid", schedules.AUTO):
            raise ValueError(f"largest_step: only for geometric and hybrid, not '{self.kind}'; use steps")
        if self.largest_step is not None and self.steps is not None:
            raise ValueError("largest_step: give either steps or largest_step, not both")
        if self.first is not None and self.kind != "hybrid":
            raise ValueError(f"first: only the hybrid schedule has a first step of its own, not '{self.kind}'")
        return self

    def decided(self, kind: str) -> Schedule:
        """This schedule with `auto` replaced."""
        values = self.model_dump(exclude_unset=True) | {"kind": kind}
        if kind == "one_shot":
            values = {key: value for key, value in values.items() if key not in ("steps", "largest_step")}
        return Schedule.model_validate(values)

    def targets(self, ratio: float) -> list[float]:
        """The cumulative fraction removed after each step, up to `ratio`."""
        if ratio == 0:
            return [0.0]
        if self.kind == schedules.AUTO:
            return [ratio]
        steps = self.steps or {"one_shot": 1, "hybrid": 3}.get(self.kind, 5)
        if self.largest_step is not None:
            first = 0.0
            if self.kind == "hybrid":
                first = 0.75 * ratio if self.first is None else self.first
            steps = schedules.steps_for(ratio, self.largest_step, first=first)
        return schedules.targets(self.kind, ratio, steps, first=self.first)


class Distillation(StrictModel):
    """The dense model teaches the pruned one: `(1 - alpha) * loss + alpha * T^2 * KL(dense / T, pruned / T)`.

    Source: Hinton, Vinyals, Dean (2015), arXiv 1503.02531.

    Attributes:
        temperature: T, by which both models' logits are divided.
        alpha: the part of the loss that is the teacher's; 1 leaves the labels out.
    """

    temperature: Annotated[float, Field(gt=0)] = 2.0
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.5


class Recovery(StrictModel):
    """How a phase fine-tunes after its pruning step, and when it ends. A list: one value a step, the last repeated.

    Attributes:
        epochs: epochs a phase; with patience, the most it may take. By default TrainingArguments.num_train_epochs.
        steps: optimizer steps a phase, instead of epochs.
        patience: end the phase after so many evaluations without an improvement of more than `min_delta`.
        min_delta: the least change of the monitored metric that counts as an improvement.
        monitor: the metric watched, as `evaluate()` names it; by default metric_for_best_model, then the loss.
        greater_is_better: whether the metric is to grow; by default judged by its name (loss and perplexity shrink).
        learning_rate: of each phase; by default TrainingArguments.learning_rate.
        restore_best: end each phase on its best evaluated weights, those right after pruning included.
        distill: let the dense model teach: `{temperature: 2, alpha: 0.5}`. Costs a second copy of the weights in memory
            and a forward pass of the dense model a batch.
        max_drop: how far the monitored metric may be behind the dense model's at the end of a step: percentage points
            (`3`), or a fraction of the dense value (`{relative: 0.05}`).
        on_collapse: what follows where it is further: `rollback` ends on the last step that held, `halve_step` goes on
            from there with half the step (down to an eighth), `stop` ends on the step as it is.
    """

    epochs: Annotated[float, Field(ge=0)] | list[Annotated[float, Field(ge=0)]] | None = None
    steps: Annotated[int, Field(ge=0)] | list[Annotated[int, Field(ge=0)]] | None = None
    patience: Annotated[int, Field(ge=1)] | list[Annotated[int, Field(ge=1)]] | None = None
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    monitor: str | None = None
    greater_is_better: bool | None = None
    learning_rate: Annotated[float, Field(gt=0)] | list[Annotated[float, Field(gt=0)]] | None = None
    restore_best: bool = True
    distill: Distillation | None = None
    max_drop: Annotated[Drop | None, BeforeValidator(points)] = None
    on_collapse: Literal["rollback", "halve_step", "stop"] = "rollback"

    @field_validator("distill", mode="before")
    @classmethod
    def _bare_switch(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _consistent(self) -> Recovery:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("steps: give either epochs or steps, not both")
        if self.max_drop is None and self.on_collapse != "rollback":
            raise ValueError("on_collapse: nothing collapses without a max_drop; give one, or leave it out")
        for name in ("epochs", "steps", "patience", "learning_rate"):
            if getattr(self, name) == []:
                raise ValueError(f"{name}: an empty list says nothing; give at least one value")
        return self

    def value(self, name: str, step: int) -> Any:
        """The value of a field in the phase after `step` (counted from 0); None where nothing was said."""
        value = getattr(self, name)
        return value[min(step, len(value) - 1)] if isinstance(value, list) else value


class PruningConfig(StrictModel):
    """What to prune, by how much, when, and how to recover.

    Attributes:
        criterion: the name of a registered criterion, or a map of `name` and its parameters.
        granularity: `weight`, `N:M` (N kept of every M along the input dimension) or `block:ROWSxCOLS` hold weights at
            zero. `channel` (any coupled group), `head`, `head_dim` (inside all heads of a layer alike), `neuron`,
            `width` and `layer`, or a list of them, are removed physically. `rank` writes weights as a product of two
            and drops their least components; beside others it comes after them in each step.
        scope: `global` ranks all layers together, `layer` prunes every layer by the same ratio, `isomorphic`
            (structural only) ranks groups of the same shape together.
        target: how much goes; a bare number is a ratio. May be left out for N:M, which says it itself.
        schedule: in how many steps; a bare name is its kind.
        export_sizes: structural: what is left after each step, falling, as fractions of the dense model's parameters
            (or of what `target` measures); the trainer leaves a checkpoint of every size. It stands for the schedule,
            and for the target where that is left out.
        recovery: the fine-tuning after each step.
        include: glob patterns over module and parameter names; by default every linear and convolution weight.
            A bias, norm or embedding is pruned only where a pattern's last part names it (`*.bias`, `*.norm1`).
        ignore: glob patterns of what is left alone.
        per_layer: pattern to ratio, for layers with a ratio of their own; for structural granularities also a list with
            a ratio for every group, in the order of `hfprune inspect`.
        min_kept: the fewest units that every layer keeps: a number of units, or a fraction of the layer's. Structural
            removal keeps at least one.
        round_to: structural: the channels that stay in a layer are a multiple of this, where it is large enough.
        reduction: structural: how a unit's scores in the tensors of its group become one: `mean`, `sum` or `max`.
        normalize: structural: what the scores of a group are divided by, so that groups can be ranked together: their
            `mean`, their `max`, or `none`.
        seed: of random scores and of drawn batches; by default the training's seed.
        strategy: `ice` (`hfprune.strategy.Ice`) prunes the residual blocks one after another, each by the target's
            ratio; a phase then takes one epoch where nothing else is said.
    """

    criterion: str | dict[str, Any] = "l1"
    granularity: str | list[str] = "weight"
    scope: Literal["global", "layer", "isomorphic"] = "global"
    target: Target | None = None
    schedule: Schedule = Field(default_factory=Schedule)
    export_sizes: list[Annotated[float, Field(gt=0, lt=1)]] | None = None
    recovery: Recovery = Field(default_factory=Recovery)
    include: Patterns | None = None
    ignore: Patterns = Field(default_factory=list)
    per_layer: dict[str, Ratio] | list[Ratio] = Field(default_factory=dict)
    min_kept: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, le=1)] = 0
    round_to: Annotated[int, Field(ge=1)] = 8
    reduction: Literal["mean", "sum", "max"] = "mean"
    normalize: Literal["mean", "max", "none"] = "mean"
    seed: int | None = None
    strategy: Ice | None = None

    @field_validator("target", mode="before")
    @classmethod
    def _bare_ratio(cls, value: Any) -> Any:
        return {"ratio": value} if isinstance(value, int | float) and not isinstance(value, bool) else value

    @field_validator("schedule", "strategy", mode="before")
    @classmethod
    def _bare_kind(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @field_validator("criterion")
    @classmethod
    def _named(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        if isinstance(value, dict) and not isinstance(value.get("name"), str):
            raise ValueError("a map needs the key 'name', e.g. {name: taylor, batches: 8}")
        return value

    @field_validator("granularity")
    @classmethod
    def _known(cls, value: str | list[str]) -> str | list[str]:
        for name in [value] if isinstance(value, str) else value:
            if parse_granularity(name).kind not in STRUCTURAL and not isinstance(value, str):
                raise ValueError(f"'{name}' can't stand in a list; only {', '.join(STRUCTURAL)} can be mixed")
        if not value:
            raise ValueError("an empty list says nothing; give at least one")
        if {"head", "head_dim"} <= set(value if isinstance(value, list) else ()):
            raise ValueError("head and head_dim cut the same weights; give one of them")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> PruningConfig:
        if self.export_sizes is not None:
            self._check_sizes()
        if not self.is_structural:
            self._check_masks()
        elif self.target is None:
            raise ValueError("target: missing, e.g. {macs: 0.5}")
        elif "rank" in self.granularities:
            self._check_rank()
        try:
            if self.target is None or self.target.fraction is not None:
                self.targets()
        except ConfigError as error:
            raise ValueError(f"schedule.{error}") from error
        if self.is_structural and self.schedule.every is not None:
            raise ValueError("schedule.every: units are removed between phases, not inside one; leave it out")
        if self.strategy is not None:
            self._check_strategy()
        return self

    def _check_strategy(self) -> None:
        if self.schedule != Schedule():
            raise ValueError("schedule: the strategy ice has one step a block; leave the schedule out")
        if self.export_sizes is not None:
            raise ValueError("export_sizes: the strategy ice has one step a block, not a size; give one of the two")
        if other := {"layer", "rank"} & set(self.granularities):
            raise ValueError(f"granularity: the strategy ice prunes inside blocks, which '{min(other)}' does not; use "
                             f"channel, head, neuron or weight")  # fmt: skip
        if isinstance(self.per_layer, list):
            raise ValueError("per_layer: a list has no meaning block by block; with the strategy ice give a map")
        if self.target is not None and self.target.kind == "latency":
            raise ValueError("target.latency: what one block takes can't be timed apart; with the strategy ice use "
                             "ratio, macs or params")  # fmt: skip

    def _check_sizes(self) -> None:
        sizes = self.export_sizes
        if not self.is_structural:
            raise ValueError("export_sizes: zeros make no model smaller; use a structural granularity such as rank")
        if not sizes or sorted(set(sizes), reverse=True) != sizes:
            raise ValueError(f"export_sizes: {sizes} must be fractions that fall, e.g. [0.8, 0.6, 0.4]")
        if self.schedule != Schedule():
            raise ValueError("schedule: export_sizes says the steps; give one of the two")
        if self.target is None:
            self.target = Target(params=sizes[-1])
        elif self.target.fraction is None or abs(1 - self.target.fraction - sizes[-1]) > 1e-9:
            raise ValueError(f"target: export_sizes ends at {sizes[-1]:g} of the dense model; leave the target out")

    def _check_rank(self) -> None:
        mixed = len(self.granularities) > 1
        if self.target.kind == "latency":
            raise ValueError("target.latency: ranks are chosen by what they cost; give params or macs")
        if mixed and self.target.kind == "ratio":
            raise ValueError("target.ratio: components and other units are not counted together; give params or macs")
        if self.per_layer and (mixed or isinstance(self.per_layer, list)):
            raise ValueError("per_layer: rank takes a map of patterns, and none beside other granularities")

    def _check_masks(self) -> None:
        shape = parse_granularity(self.granularity)
        if self.target is not None and self.target.kind != "ratio":
            raise ValueError(f"target.{self.target.kind}: zeros cost as much as other numbers; give a ratio, or a "
                             f"structural granularity such as channel")  # fmt: skip
        if self.scope == "isomorphic":
            raise ValueError("scope: isomorphic is for structural granularities; use global or layer")
        if isinstance(self.per_layer, list):
            raise ValueError("per_layer: a list is for structural granularities; give a map of patterns")
        if shape.kind == "n:m":
            implied = 1 - shape.kept / shape.group
            if self.target is not None and abs(self.target.ratio - implied) > 1e-9:
                raise ValueError(f"target.ratio: {self.granularity} removes {implied:g}, not {self.target.ratio:g}")
            if self.per_layer:
                raise ValueError(f"per_layer: {self.granularity} gives every layer the same ratio; use ignore instead")
            if self.min_kept:
                raise ValueError(f"min_kept: {self.granularity} fixes what every layer keeps; use ignore instead")
        elif self.target is None:
            raise ValueError("target: missing, e.g. {ratio: 0.8}")

    @property
    def granularities(self) -> list[str]:
        """The granularities, one or several."""
        return [self.granularity] if isinstance(self.granularity, str) else self.granularity

    @property
    def is_structural(self) -> bool:
        """Whether units are physically removed."""
        return parse_granularity(self.granularities[0]).kind in STRUCTURAL

    @property
    def ratio(self) -> float:
        """The final fraction that goes, of what the target measures.

        Raises:
            ConfigError: the target is an absolute number, which only the model can tell.
        """
        if not self.is_structural and (shape := parse_granularity(self.granularity)).kind == "n:m":
            return 1 - shape.kept / shape.group
        if self.target.fraction is None:
            raise ConfigError(f"target.{self.target.kind}: an absolute number is a fraction of a model alone")
        return self.target.fraction

    @property
    def criterion_name(self) -> str:
        """The criterion's name without its parameters."""
        return self.criterion if isinstance(self.criterion, str) else self.criterion["name"]

    @property
    def criterion_parameters(self) -> dict[str, Any]:
        """The criterion's parameters without its name."""
        return {} if isinstance(self.criterion, str) else {k: v for k, v in self.criterion.items() if k != "name"}

    def targets(self) -> list[float]:
        """The cumulative fraction removed after each step."""
        if self.export_sizes is not None:
            return [1 - size for size in self.export_sizes]
        return self.schedule.targets(self.ratio)


_SHRINKING = {"loss", "error", "mse", "rmse", "mae", "mape", "smape", "mase", "brier", "wer", "cer", "ter", "ppl"}


def shrinks(metric: str) -> bool:
    """Whether a metric gets smaller as a model gets better, by the words of its name."""
    words = set(re.split(r"[^a-z0-9]+", metric.lower()))
    return bool(words & (_SHRINKING | {"perplexity"}))
