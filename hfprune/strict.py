"""Sections of a recipe that take nothing unknown: the model behind them, and its errors as one line."""

from __future__ import annotations

import re
from math import isfinite
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from hfprune.registry import did_you_mean

Ratio = Annotated[float, Field(ge=0, lt=1)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Patterns = Annotated[list[str], BeforeValidator(_as_list)]


class StrictModel(BaseModel):
    """A section in which an unknown key is an error that names the nearest known one, and so is a value of another
    type (a word, or true, for a number) and a number that is not finite."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for key in values:
            if key not in cls.model_fields:
                hint = did_you_mean(key, cls.model_fields)
                raise PydanticCustomError("unknown_key", "unknown key '{key}'; {hint}", {"key": str(key), "hint": hint})
        # A tuple is as good as a list, which is what YAML has.
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def one_line(error: ValidationError, prefix: str = "") -> str:
    """A pydantic error as one line: the key, what is wrong, the value given and, for a typo, the nearest valid key."""
    errors = [(_path(entry["loc"]), entry) for entry in error.errors()]
    # Where a value may be of several types, the one that it fits best is the one that it fails deepest in.
    path, first = max((e for e in errors if e[0][: len(errors[0][0])] == errors[0][0]), key=lambda e: len(e[0]))
    key = ".".join([prefix, *path] if prefix else path)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "unknown_key":
        key = f"{key}.{first['ctx']['key']}" if key else first["ctx"]["key"]
        return f"{key}: unknown key; {first['ctx']['hint']}"
    if first["type"] == "value_error":
        inner = re.match(r"([a-z_]+(?:\.[a-z_]+)*): (.*)", message)
        if inner:
            return f"{key}.{inner[1]}: {inner[2]}" if key else f"{inner[1]}: {inner[2]}"
        return f"{key}: {message}" if key else message
    return f"{key}: {message[0].lower()}{message[1:]}, not {first['input']!r}{unquoted(first['input'])}"


def unquoted(value: Any) -> str:
    """An ending for an error about a wrong type: a word that means a number or a truth is shown as such."""
    if not isinstance(value, str):
        return ""
    # YAML 1.2 knows only true and false; the others are words.
    words = {"yes": "true", "on": "true", "true": "true", "no": "false", "off": "false", "false": "false"}
    meant = words.get(value.lower())
    try:
        number = float(value)
        meant = f"{int(number) if number.is_integer() else number}" if isfinite(number) else None
    except ValueError:
        pass
    return f"; write {meant}, without quotes" if meant else ""


def _path(location: tuple) -> list[str]:
    return [str(part) for part in location if not _is_union_tag(part)]


def _is_union_tag(part: Any) -> bool:
    """Whether a part of pydantic's error location names a member of a union rather than a key."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float") or part.startswith("constrained-"))
