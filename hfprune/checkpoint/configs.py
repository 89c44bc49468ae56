"""A transformers config that says the small model's values, and can say the dense model's again."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from hfprune.errors import CheckpointError
from hfprune.structure.plan import Plan


def config_values(config: Any, keys: Iterable[str]) -> dict[str, Any]:
    """The present values of those keys that the config has; a dot leads into a sub-config.

    Raises:
        CheckpointError: a key names no data.
    """
    places = {key: _place(config, key) for key in keys}
    return {key: copy.deepcopy(getattr(*place)) for key, place in places.items() if hasattr(*place)}


def set_config(config: Any, values: dict[str, Any], remove: Iterable[str] = ()) -> None:
    """Sets values of a config, in place, and takes others out.

    Raises:
        CheckpointError: a key names no data, or the config does not take a value.
    """
    for key, value in values.items():
        owner, name = _place(config, key)
        try:
            setattr(owner, name, copy.deepcopy(value))
        except (TypeError, ValueError, AttributeError) as error:
            line = (str(error).splitlines() or [""])[0]
            raise CheckpointError(f"the config's {key} can't be {value!r:.80}: {line}") from error
    for key in remove:
        owner, name = _place(config, key)
        vars(owner).pop(name, None)
        if hasattr(owner, name):
            raise CheckpointError(f"the plan does not say what the config's {key} was in the dense model")


def dense_values(config: Any, plan: Plan) -> None:
    """Puts the dense model's values into a config, in place."""
    if plan.config and plan.dense_config is None:
        raise CheckpointError("malformed plan: it does not say what the config of the dense model was")
    dense = plan.dense_config or {}
    set_config(config, dense, remove=plan.config.keys() - dense.keys())


def _place(config: Any, key: str) -> tuple[Any, str]:
    """The config that holds a value, and its name there: only data, never a method."""
    *path, name = key.split(".")
    for part in path:
        config = vars(config).get(part)
        if not hasattr(config, "attribute_map"):
            raise CheckpointError(f"the config has no '{key}'")
    if name not in vars(config) and name not in config.attribute_map and hasattr(config, name):
        raise CheckpointError(f"the config's '{key}' is no value")
    return config, name
