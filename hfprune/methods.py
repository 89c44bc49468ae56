"""Methods: the ways of making a model smaller that `hfprune compare` sets side by side."""

from __future__ import annotations

import re
from typing import Any

from pydantic import field_validator, model_validator

from hfprune.errors import ConfigError
from hfprune.granularity import STRUCTURAL, parse_granularity
from hfprune.registry import did_you_mean
from hfprune.strict import StrictModel

UNSTRUCTURED, STRUCTURED, LOW_RANK = "unstructured", "structured", "low_rank"
_GRANULARITIES: dict[str, str | list[str]] = {
    UNSTRUCTURED: "weight",
    STRUCTURED: ["head", "neuron"],
    LOW_RANK: "rank",
}
_CRITERIA = {
    UNSTRUCTURED: ["l1", "wanda", "taylor"],
    STRUCTURED: ["l1", "wanda", "taylor"],
    LOW_RANK: ["singular_value", "whitening"],
}


class Method(StrictModel):
    """One method of a comparison; a bare name of the three known ones is enough.

    Attributes:
        name: `unstructured`, `structured` and `low_rank` need nothing else; any other name needs a granularity.
        granularity: as in `pruning.granularity`. By default single weights; heads and neurons (channels, where a model
            has no attention); ranks.
        criteria: names, or maps as in `pruning.criterion`; by default those of `compare.criteria` that apply, and where
            that is left out one of magnitude and those that look at data: `l1`, `wanda` and `taylor`; for ranks
            `singular_value` and `whitening`.
    """

    name: str
    granularity: str | list[str] | None = None
    criteria: list[str | dict[str, Any]] | None = None

    @field_validator("name")
    @classmethod
    def _fit_for_a_folder(cls, name: str) -> str:
        if not re.fullmatch(r"\w[\w-]*", name):
            raise ValueError(f"'{name}' must be letters, digits, _ and -")
        return name

    @model_validator(mode="after")
    def _consistent(self) -> Method:
        if self.granularity is None and self.name not in _GRANULARITIES:
            raise ValueError(f"unknown method '{self.name}'; {did_you_mean(self.name, _GRANULARITIES)}; any other name "
                             f"needs a granularity")  # fmt: skip
        if self.criteria == []:
            raise ValueError("criteria: an empty list says nothing; give at least one")
        try:
            kinds = {parse_granularity(name).kind for name in self.granularities}
        except ConfigError as error:
            raise ValueError(f"granularity: {error}") from error
        if "n:m" in kinds:
            raise ValueError(f"granularity: {self.granularities[0]} fixes what goes, and so can't reach several sizes")
        return self

    @property
    def granularities(self) -> list[str]:
        """The granularities, one or several."""
        found = self.granularity if self.granularity is not None else _GRANULARITIES[self.name]
        return [found] if isinstance(found, str) else found

    @property
    def config_granularity(self) -> str | list[str]:
        """The granularity as a `PruningConfig` takes it."""
        return self.granularities if len(self.granularities) > 1 else self.granularities[0]

    @property
    def is_open(self) -> bool:
        """Whether the model decides between heads and neurons, and channels."""
        return self.granularity is None and self.name == STRUCTURED

    @property
    def kind(self) -> str:
        """`unstructured`, `structured` or `low_rank`, whatever the name: by what the granularity does."""
        if "rank" in self.granularities:
            return LOW_RANK
        return STRUCTURED if parse_granularity(self.granularities[0]).kind in STRUCTURAL else UNSTRUCTURED

    def criteria_or(self, shared: list[Any] | None, last: Any) -> list[Any]:
        """The criteria to run: its own, or else those of all methods, its usual ones, or the recipe's."""
        return self.criteria or shared or _CRITERIA.get(self.name) or [last]


def named(value: Any) -> Any:
    """Bare names as the methods of these names; one alone as a list of one."""
    values = [value] if isinstance(value, str) else value
    return [{"name": one} if isinstance(one, str) else one for one in values] if isinstance(values, list) else values


def check_names(methods: list[Method]) -> list[Method]:
    """The methods, whose names must differ.

    Raises:
        ValueError: there are none, or two of a name.
    """
    if not methods:
        raise ValueError("an empty list says nothing; give at least one")
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"'{name}' stands twice; give each a name of its own")
    return methods
