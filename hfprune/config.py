"""PruningConfig: what to prune, by how much, when, and how to recover; also the recipe's `pruning:` section."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from hfprune import schedules
from hfprune.errors import ConfigError
from hfprune.registry import did_you_mean

Ratio = Annotated[float, Field(ge=0, lt=1)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Patterns = Annotated[list[str], BeforeValidator(_as_list)]


class StrictModel(BaseModel):
    """A section in which an unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        for key in values if isinstance(values, dict) else ():
            if key not in cls.model_fields:
                hint = did_you_mean(key, cls.model_fields)
                raise PydanticCustomError("unknown_key", "unknown key '{key}'; {hint}", {"key": str(key), "hint": hint})
        return values


class Granularity(NamedTuple):
    """A granularity taken apart: `kind` is `weight`, `n:m` or `block`; the other fields belong to the last two."""

    kind: str
    kept: int = 0
    group: int = 0
    rows: int = 0
    cols: int = 0


def parse_granularity(text: str) -> Granularity:
    """`weight`, `2:4` (2 kept of every 4 along the input dimension) or `block:4x4` (rows x columns).

    Raises:
        ConfigError: for anything else.
    """
    if text == "weight":
        return Granularity("weight")
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        kept, group = int(match[1]), int(match[2])
        if 0 < kept < group:
            return Granularity("n:m", kept=kept, group=group)
        raise ConfigError(f"'{text}' must keep fewer than it groups, and at least one, e.g. 2:4")
    if match := re.fullmatch(r"block:(\d+)x(\d+)", text):
        rows, cols = int(match[1]), int(match[2])
        if rows and cols:
            return Granularity("block", rows=rows, cols=cols)
    raise ConfigError(f"unknown granularity '{text}'; known: weight, N:M (e.g. 2:4), block:ROWSxCOLS (e.g. block:4x4)")


class Target(StrictModel):
    """How much goes. `ratio`: the fraction of the prunable units; exactly `round(ratio * units)` of them go."""

    ratio: Ratio


class Schedule(StrictModel):
    """In how many steps, and how large each is (`hfprune.schedules`).

    Attributes:
        kind: `one_shot`, `constant`, `geometric`, `cubic` or `hybrid`.
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
        if kind not in schedules.schedules:
            raise ValueError(f"unknown schedule '{kind}'; {did_you_mean(kind, schedules.schedules)}")
        return kind

    @model_validator(mode="after")
    def _consistent(self) -> Schedule:
        if self.kind == "one_shot" and (self.steps or 1) > 1:
            raise ValueError(f"steps: one_shot has one step, not {self.steps}; use geometric or constant for several")
        if self.largest_step is not None and self.kind not in ("geometric", "hybrid"):
            raise ValueError(f"largest_step: only for geometric and hybrid, not '{self.kind}'; use steps")
        if self.largest_step is not None and self.steps is not None:
            raise ValueError("largest_step: give either steps or largest_step, not both")
        if self.first is not None and self.kind != "hybrid":
            raise ValueError(f"first: only the hybrid schedule has a first step of its own, not '{self.kind}'")
        return self

    def targets(self, ratio: float) -> list[float]:
        """The cumulative fraction removed after each step, up to `ratio`."""
        if ratio == 0:
            return [0.0]
        steps = self.steps or {"one_shot": 1, "hybrid": 3}.get(self.kind, 5)
        if self.largest_step is not None:
            first = 0.0
            if self.kind == "hybrid":
                first = 0.75 * ratio if self.first is None else self.first
            steps = schedules.steps_for(ratio, self.largest_step, first=first)
        return schedules.targets(self.kind, ratio, steps, first=self.first)


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
    """

    epochs: Annotated[float, Field(ge=0)] | list[Annotated[float, Field(ge=0)]] | None = None
    steps: Annotated[int, Field(ge=0)] | list[Annotated[int, Field(ge=0)]] | None = None
    patience: Annotated[int, Field(ge=1)] | list[Annotated[int, Field(ge=1)]] | None = None
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    monitor: str | None = None
    greater_is_better: bool | None = None
    learning_rate: Annotated[float, Field(gt=0)] | list[Annotated[float, Field(gt=0)]] | None = None
    restore_best: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> Recovery:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("steps: give either epochs or steps, not both")
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
        granularity: `weight`, `N:M` (N kept of every M along the input dimension) or `block:ROWSxCOLS`.
        scope: `global` ranks all layers together, `layer` prunes every layer by the same ratio.
        target: how much goes; a bare number is a ratio. May be left out for N:M, which says it itself.
        schedule: in how many steps; a bare name is its kind.
        recovery: the fine-tuning after each step.
        include: glob patterns over module and parameter names; by default every linear and convolution weight.
            A bias, norm or embedding is pruned only where a pattern's last part names it (`*.bias`, `*.norm1`).
        ignore: glob patterns of what is left alone.
        per_layer: pattern to ratio, for layers with a ratio of their own.
        min_kept: the fewest units that every layer keeps: a number of units, or a fraction of the layer's.
        seed: of random scores and of drawn batches; by default the training's seed.
    """

    criterion: str | dict[str, Any] = "l1"
    granularity: str = "weight"
    scope: Literal["global", "layer"] = "global"
    target: Target | None = None
    schedule: Schedule = Field(default_factory=Schedule)
    recovery: Recovery = Field(default_factory=Recovery)
    include: Patterns | None = None
    ignore: Patterns = Field(default_factory=list)
    per_layer: dict[str, Ratio] = Field(default_factory=dict)
    min_kept: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, le=1)] = 0
    seed: int | None = None

    @field_validator("target", mode="before")
    @classmethod
    def _bare_ratio(cls, value: Any) -> Any:
        return {"ratio": value} if isinstance(value, int | float) and not isinstance(value, bool) else value

    @field_validator("schedule", mode="before")
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
    def _known(cls, value: str) -> str:
        parse_granularity(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> PruningConfig:
        shape = parse_granularity(self.granularity)
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
        try:
            self.targets()
        except ConfigError as error:
            raise ValueError(f"schedule.{error}") from error
        return self

    @property
    def ratio(self) -> float:
        """The final fraction of units that goes."""
        shape = parse_granularity(self.granularity)
        return 1 - shape.kept / shape.group if shape.kind == "n:m" else self.target.ratio

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
        return self.schedule.targets(self.ratio)


_SHRINKING = {"loss", "error", "mse", "rmse", "mae", "mape", "smape", "mase", "brier", "wer", "cer", "ter", "ppl"}


def shrinks(metric: str) -> bool:
    """Whether a metric gets smaller as a model gets better, by the words of its name."""
    words = set(re.split(r"[^a-z0-9]+", metric.lower()))
    return bool(words & (_SHRINKING | {"perplexity"}))


def one_line(error: ValidationError, prefix: str = "") -> str:
    """A pydantic error as one line: the key, what is wrong, the value given and, for a typo, the nearest valid key."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"] if not _is_union_tag(part))
    key = ".".join(part for part in (prefix, path) if part)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "unknown_key":
        key = f"{key}.{first['ctx']['key']}" if key else first["ctx"]["key"]
        return f"{key}: unknown key; {first['ctx']['hint']}"
    if first["type"] == "value_error":
        inner = re.match(r"([a-z_]+(?:\.[a-z_]+)*): (.*)", message)
        if inner:
            return f"{key}.{inner[1]}: {inner[2]}" if key else f"{inner[1]}: {inner[2]}"
        return f"{key}: {message}" if key else message
    return f"{key}: {message[0].lower()}{message[1:]}, not {first['input']!r}"


def _is_union_tag(part: Any) -> bool:
    """Whether a part of pydantic's error location names a member of a union rather than a key."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float") or part.startswith("constrained-"))
