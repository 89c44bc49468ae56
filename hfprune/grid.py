"""Grid: which methods, schedules, ratios and criteria a comparison runs, over which seeds, and how long each run
fine-tunes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from hfprune import schedules
from hfprune.config import PruningConfig
from hfprune.errors import ConfigError
from hfprune.methods import UNSTRUCTURED, Method, check_names, named
from hfprune.registry import did_you_mean
from hfprune.strict import StrictModel, one_line

Epochs = Annotated[float, Field(ge=0)]
DEFAULT_RATIOS = [0.5, 0.7, 0.8, 0.88, 0.92, 0.96]
DEFAULT_SIZES = [0.7, 0.5, 0.3]


SIMULATED = "simulated"


class Rescore(StrictModel):
    """The recipe's `compare.rescore:`: n-best lists of a recogniser that every run's language model ranks anew. A bare
    name stands for `lists`.

    Attributes:
        lists: a file of JSON lines (`hfprune.speech.nbest`), or `simulated`: the data's split `test` through a noisy
            channel (`hfprune.speech.channel`).
        development: another file, on which the weight of the language model is chosen; by default each half of the
            lists is ranked with what the other half chose. Simulated lists have the split `validation` for it.
        utterances: use only the first so many of each.
        words: of a simulated utterance, at most; longer texts are left out.
        hypotheses: the most of a simulated list.
        noise: of the simulated acoustic scores, where a swap of unlike sounds costs 1.
        seed: of that noise.
    """

    lists: Annotated[str, Field(min_length=1)]
    development: str | None = None
    utterances: Annotated[int, Field(ge=2)] | None = None
    words: Annotated[int, Field(ge=1)] = 10
    hypotheses: Annotated[int, Field(ge=1)] = 16
    noise: Annotated[float, Field(ge=0)] = 0.35
    seed: int = 0

    @model_validator(mode="after")
    def _consistent(self) -> Rescore:
        simulated = self.lists == SIMULATED
        if simulated and self.development is not None:
            raise ValueError("development: simulated lists have their own, from the split validation; leave it out")
        for key in ("words", "hypotheses", "noise", "seed"):
            if not simulated and key in self.model_fields_set:
                raise ValueError(f"{key}: says how lists are simulated, and '{self.lists}' is a file; leave it out")
        return self


class Grid(StrictModel):
    """The recipe's `compare:` section: every schedule at every ratio with every criterion, each with every seed; with
    `methods` also every method, at every size in place of a ratio.

    Attributes:
        methods: names, or maps (`hfprune.methods.Method`).
        schedules: names of schedules.
        ratios: the fractions that go of what the recipe's target measures, each in (0, 1).
        sizes: with methods, instead of ratios: the fractions of all the dense model's parameters, embeddings included,
            that are left and are not zero, each in (0, 1); by default .7, .5 and .3.
        criteria: names, or maps as in `pruning.criterion`; by default the recipe's own.
        seeds: how many; the first is `training.seed`, the others follow it.
        steps: the pruning steps of the iterative schedules; the hybrid's large first one is among them.
        largest_step: instead of `steps`: as many geometric steps as keep each within this fraction of what remains; the
            other iterative schedules take as many, the hybrid as few as its own steps need.
        budget: epochs of fine-tuning a run, over all its steps; several are compared one beside another.
        patience: instead: every step fine-tunes until so many evaluations brought nothing.
        rescore: with methods, of language models: n-best lists on which every run's word error rate is measured.
    """

    methods: list[Method] | None = None
    schedules: list[str] = Field(default_factory=lambda: ["one_shot", "constant", "geometric", "hybrid"])
    ratios: list[float] | None = None
    sizes: list[float] | None = None
    criteria: list[str | dict[str, Any]] | None = None
    seeds: Annotated[int, Field(ge=1)] = 3
    steps: Annotated[int, Field(ge=2, le=10_000)] | None = None
    largest_step: Annotated[float, Field(ge=1e-3, lt=1)] | None = None
    budget: Epochs | list[Epochs] | None = None
    patience: Annotated[int, Field(ge=1)] | None = None
    rescore: Rescore | None = None

    @field_validator("rescore", mode="before")
    @classmethod
    def _bare_lists(cls, rescore: Any) -> Any:
        return {"lists": rescore} if isinstance(rescore, str) else rescore

    @field_validator("schedules")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            if name == schedules.AUTO:
                raise ValueError("auto picks one of the others; name those to compare")
            if name not in schedules.schedules:
                raise ValueError(f"unknown schedule '{name}'; {did_you_mean(name, schedules.schedules)}")
        return _some(names)

    @field_validator("methods", mode="before")
    @classmethod
    def _bare_names(cls, methods: Any) -> Any:
        return named(methods)

    @field_validator("methods")
    @classmethod
    def _differ(cls, methods: list[Method] | None) -> list[Method] | None:
        return methods if methods is None else check_names(methods)

    @field_validator("ratios")
    @classmethod
    def _fractions(cls, ratios: list[float] | None) -> list[float] | None:
        return ratios if ratios is None else sorted(_shares(ratios, "that goes"))

    @field_validator("sizes")
    @classmethod
    def _fractions_left(cls, sizes: list[float] | None) -> list[float] | None:
        return sizes if sizes is None else sorted(_shares(sizes, "that is left"), reverse=True)

    @field_validator("criteria", "budget")
    @classmethod
    def _not_empty(cls, values: Any) -> Any:
        return _some(values) if isinstance(values, list) else values

    @model_validator(mode="after")
    def _consistent(self) -> Grid:
        if self.budget is not None and self.patience is not None:
            raise ValueError("patience: give either budget or patience, not both")
        if self.steps is not None and self.largest_step is not None:
            raise ValueError("largest_step: give either steps or largest_step, not both")
        if self.methods is None and self.sizes is not None:
            raise ValueError("sizes: need methods, such as [unstructured, structured, low_rank]; or give ratios")
        if self.methods is not None and self.ratios is not None:
            raise ValueError("ratios: methods are compared at sizes, the fraction that is left; give sizes instead")
        if self.methods is None and self.rescore is not None:
            raise ValueError("rescore: needs methods, such as [unstructured, structured, low_rank]")
        return self

    @property
    def targets(self) -> list[float]:
        """The fractions that go; with methods, of all parameters."""
        if self.methods is None:
            return self.ratios or DEFAULT_RATIOS
        return [round(1 - size, 9) for size in self.sizes or DEFAULT_SIZES]

    @property
    def budgets(self) -> list[float | None]:
        """The budgets in epochs; None alone where patience ends the steps."""
        return sorted(self.budget) if isinstance(self.budget, list) else [self.budget]

    def cells(self, pruning: PruningConfig, first_seed: int) -> list[Cell]:
        """Every run of the grid, seed by seed, so that an early end leaves all strategies alike.

        Args:
            pruning: the recipe's section, of which schedule, target, criterion and recovery's length are replaced, and
                with methods the granularity.
            first_seed: the recipe's.

        Raises:
            ConfigError: the recipe says neither a budget nor a patience, or a strategy does not fit the rest of it.
        """
        if pruning.strategy is not None:
            raise ConfigError("pruning.strategy: ice has one step a block, and so no schedule to compare; leave it out")
        if pruning.export_sizes is not None:
            raise ConfigError("pruning.export_sizes: says the targets itself, as compare.ratios does; leave it out")
        patience = self.patience
        if self.budget is None and patience is None:
            patience = pruning.recovery.patience
            if patience is None:
                raise ConfigError("compare.budget: missing; say how many epochs of fine-tuning a run may take in all "
                                  "(--budget 10), or when a step ends (--patience 2)")  # fmt: skip
        seeds = range(first_seed, first_seed + self.seeds)
        cells = []
        for seed, budget, ratio, (method, criterion), kind in product(
            seeds, self.budgets, self.targets, self._choices(pruning), self.schedules
        ):
            config = self._pruning(pruning, kind, ratio, criterion, method)
            cells.append(Cell(kind, ratio, criterion, seed, budget, patience, config, method))
        return list({cell.key: cell for cell in cells}.values())

    def _choices(self, pruning: PruningConfig) -> list[tuple[Method | None, Any]]:
        """Each method with each of its criteria."""
        if self.methods is None:
            return [(None, criterion) for criterion in self.criteria or [pruning.criterion]]
        return [(m, criterion) for m in self.methods for criterion in m.criteria_or(self.criteria, pruning.criterion)]

    def _pruning(
        self, base: PruningConfig, kind: str, ratio: float, criterion: Any, method: Method | None
    ) -> PruningConfig:
        schedule: dict[str, Any] = {"kind": kind}
        if kind != "one_shot":
            schedule |= self._steps(kind, ratio)
        measured = base.target.kind if base.target is not None else "ratio"
        own: dict[str, Any] = {}
        if method is not None:
            measured = "ratio" if method.kind == UNSTRUCTURED else "params"
            own = {"granularity": method.config_granularity}
        target = {measured: ratio if measured == "ratio" else round(1 - ratio, 9)}
        own |= {"criterion": criterion, "target": target, "schedule": schedule}
        values = base.model_dump(exclude_unset=True) | own
        try:
            return PruningConfig.model_validate(values)
        except ValidationError as error:
            where = "pruning" if method is None else f"compare.methods.{method.name}"
            raise ConfigError(one_line(error, where)) from error

    def _steps(self, kind: str, ratio: float) -> dict[str, int]:
        """So many steps for a schedule; a hybrid's are counted without its first."""
        if self.largest_step is None:
            return {"steps": (self.steps or 4) - (kind == "hybrid")}
        first = 0.75 * ratio if kind == "hybrid" else 0.0
        return {"steps": schedules.steps_for(ratio, self.largest_step, first=first)}


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
        schedule, ratio, criterion, seed: what it is run with.
        budget: epochs of fine-tuning in all; None where patience ends every step.
        patience: evaluations without improvement that end a step; one, or one a step.
        pruning: what all that is for the recipe, its length of recovery apart.
        method: where methods are compared; the ratio is then of all parameters (`analysis.methods.fitted`).
    """

    schedule: str
    ratio: float
    criterion: str | dict[str, Any]
    seed: int
    budget: float | None
    patience: int | list[int] | None
    pruning: PruningConfig
    method: Method | None = None

    @property
    def size(self) -> float:
        """The fraction that is left."""
        return round(1 - self.ratio, 9)

    @property
    def criterion_words(self) -> str:
        """The criterion with its parameters."""
        if isinstance(self.criterion, str):
            return self.criterion
        more = [f"{key}={value}" for key, value in self.criterion.items() if key != "name"]
        return " ".join([self.criterion["name"], *more])

    @property
    def length_words(self) -> str:
        """How long it fine-tunes."""
        return f"{self.budget:g} epochs" if self.budget is not None else f"patience {self.patience}"

    @property
    def words(self) -> str:
        """The run for a person."""
        what = f"{self.criterion_words} {self.schedule} {self.ratio:.4g}"
        if self.method is not None:
            what = f"{self.method.name} {self.criterion_words} {self.schedule} at {self.size:.4g}"
        return f"{what}, {self.length_words}, seed {self.seed}"

    @property
    def key(self) -> str:
        """The name of the run's folder: the same for the same run, and for no other of the same model and data."""
        facts = [self.pruning.model_dump(mode="json", exclude_defaults=True), self.seed, self.budget, self.patience]
        what = f"{self.pruning.criterion_name}-{self.schedule}-{self.ratio:g}"
        if self.method is not None:
            facts.append([self.method.name, self.method.is_open])
            what = f"{self.method.name}-{self.pruning.criterion_name}-{self.schedule}-{self.size:g}"
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
        length = f"{self.budget:g}ep" if self.budget is not None else "patience"
        return f"{what}-{length}-seed{self.seed}-{digest}"

    def shares(self, steps: int) -> list[float]:
        """The part of the budget that each of so many steps gets: alike, but half of it for the hybrid's first."""
        if self.schedule == "hybrid" and steps > 1:
            return [0.5, *[0.5 / (steps - 1)] * (steps - 1)]
        return [1 / steps] * steps

    def lengths(self, steps: int, updates_per_epoch: int) -> list[int]:
        """Optimizer steps a pruning step, exactly the budget in all.

        Raises:
            ConfigError: the budget leaves a pruning step without any.
        """
        total = round(self.budget * updates_per_epoch)
        ends, reached = [0], 0.0
        for share in self.shares(steps):
            reached += share
            ends.append(round(reached * total))
        lengths = [end - begin for begin, end in zip(ends, ends[1:], strict=False)]
        if total and not min(lengths):
            raise ConfigError(
                f"compare.budget: {self.budget:g} epochs are {total} optimizer steps, too few for the {steps} pruning "
                f"steps of {self.schedule}; give more, or fewer compare.steps"
            )
        return lengths


def _shares(values: list[float], words: str) -> list[float]:
    """Fractions, each once; a ValueError where one is none."""
    for value in values:
        if not 0 < value < 1:
            hint = f"; {value:g} % is {value / 100:g}" if 1 < value < 100 else ""
            raise ValueError(f"{value:g} must be the fraction {words}, between 0 and 1{hint}")
    return _some(values)


def _some(values: list) -> list:
    """The values, each once; a ValueError where there are none."""
    if not values:
        raise ValueError("an empty list says nothing; give at least one")
    kept: list = []
    for value in values:
        if value not in kept:
            kept.append(value)
    return kept


def overrides_of(
    schedules: str | None = None,
    ratios: str | None = None,
    criteria: str | None = None,
    budget: str | None = None,
    patience: int | None = None,
    seeds: int | None = None,
    steps: int | None = None,
    methods: str | None = None,
    sizes: str | None = None,
) -> list[str]:
    """Overrides of a recipe's `compare:` section from the command line's options; lists have commas.

    Of two keys that exclude each other the one that is given takes the place of the recipe's.
    """
    lists = {"schedules": schedules, "ratios": ratios, "criteria": criteria, "budget": budget}
    lists |= {"methods": methods, "sizes": sizes}
    said = {key: f"[{text}]" for key, text in lists.items() if text is not None}
    numbers = {"patience": patience, "seeds": seeds, "steps": steps}
    said |= {key: str(number) for key, number in numbers.items() if number is not None}
    excluding = (("budget", "patience"), ("patience", "budget"), ("steps", "largest_step"), ("methods", "ratios"))
    for one, other in excluding:
        if one in said and other not in said:
            said[other] = "null"
    return [f"compare.{key}={text}" for key, text in said.items()]
