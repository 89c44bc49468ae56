"""The plan: what the shapes of a pruned checkpoint can't tell. Plain data, checked strictly, never code."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from hfprune.errors import CheckpointError

Value = int | float | list[int]

_DEPTH = 4  # how deeply the values of a config may be nested
_RESERVED = ("quantization_config", "hfprune", "auto_map", "architectures", "model_type", "transformers_weights")


@dataclass
class Plan:
    """What was done to a model's structure, in the paths of the dense model.

    Attributes:
        attributes: module path → attribute → value: an integer, a float or a list of integers. `config.x` stands for a
            value of the config that the module reads: it gets a copy of its own.
        buffers: path of a buffer that no file holds → dimension → the indices that are kept, in order.
        dropped: paths of the blocks that are gone; each is an element of a ModuleList or Sequential.
        config: values of the model's config that the cut changed everywhere alike; a dot leads into a sub-config.
        factored: path of a linear layer or convolution that is a product of two → its rank.
        dense_config: the dense model's values for the keys of `config` that it has; None where nobody looked yet.
    """

    attributes: dict[str, dict[str, Value]] = field(default_factory=dict)
    buffers: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    dense_config: dict[str, Any] | None = None
    factored: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON holds it."""
        buffers = {
            path: {str(dim): list(kept) for dim, kept in sorted(cut.items())}
            for path, cut in sorted(self.buffers.items())
        }
        attributes = {
            path: {name: list(value) if isinstance(value, tuple | list) else value for name, value in sorted(v.items())}
            for path, v in sorted(self.attributes.items())
        }
        values = {
            "attributes": attributes,
            "buffers": buffers,
            "dropped": list(self.dropped),
            "config": dict(self.config),
        }
        if self.factored:
            values["factored"] = dict(sorted(self.factored.items()))
        return values if self.dense_config is None else values | {"dense_config": dict(self.dense_config)}

    @classmethod
    def from_dict(cls, values: Any) -> Plan:
        """The plan that JSON holds.

        Raises:
            CheckpointError: anything in it is not as described above.
        """
        parts = {"attributes": dict, "buffers": dict, "dropped": list, "config": dict, "dense_config": dict}
        parts["factored"] = dict
        values = _expect(values, dict, "the plan")
        for key in values:
            if key not in parts:
                raise CheckpointError(f"malformed plan: unknown part {key!r:.80}")
        found = {key: _expect(values.get(key, kind()), kind, f"'{key}'") for key, kind in parts.items()}
        plan = cls(
            attributes={_path(p, root=True): _attributes(p, v) for p, v in found["attributes"].items()},
            buffers={_path(p): _cut(p, v) for p, v in found["buffers"].items()},
            dropped=[_path(p) for p in found["dropped"]],
            config={_key(key): _json(key, value) for key, value in found["config"].items()},
            factored={_path(path): _rank(path, rank) for path, rank in found["factored"].items()},
        )
        if "dense_config" in values:
            plan.dense_config = {_key(key): _json(key, value) for key, value in found["dense_config"].items()}
        if not (plan.dense_config or {}).keys() <= plan.config.keys():
            raise CheckpointError("malformed plan: 'dense_config' has keys that 'config' has not")
        if len(set(plan.dropped)) != len(plan.dropped):
            raise CheckpointError("malformed plan: a block is dropped twice")
        return plan


def _expect(value: Any, kind: type, what: str) -> Any:
    if type(value) is not kind:
        raise CheckpointError(f"malformed plan: {what} is {value!r:.80}, not a {'map' if kind is dict else 'list'}")
    return value


def _path(path: Any, root: bool = False) -> str:
    """A module's path: names between dots, none of them one of Python's own."""
    if root and path == "":
        return path
    parts = path.split(".") if isinstance(path, str) else [""]
    if not all(part and part.isprintable() and not part.startswith("__") for part in parts):
        raise CheckpointError(f"malformed plan: {path!r:.80} is no path of a module")
    return path


def _attributes(path: str, values: Any) -> dict[str, Value]:
    for name, value in _expect(values, dict, f"'attributes' of '{path:.80}'").items():
        where = f"{path:.80}.{name!r:.80}"
        bare = name.removeprefix("config.") if isinstance(name, str) else ""
        if not bare.isidentifier() or bare.startswith("__") or (bare != name and bare in _RESERVED):
            raise CheckpointError(f"malformed plan: {where} is no name of an attribute")
        listed = type(value) is list and len(value) <= 64 and all(_integer(item) for item in value)
        if not listed and not _integer(value) and not (type(value) is float and math.isfinite(value)):
            raise CheckpointError(f"malformed plan: {where} is {value!r:.80}, not a number or list of integers")
    return dict(values)


def _rank(path: str, rank: Any) -> int:
    if not _integer(rank) or rank < 1:
        raise CheckpointError(f"malformed plan: the rank of '{path:.80}' is {rank!r:.80}")
    return rank


def _integer(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _cut(path: str, values: Any) -> dict[int, list[int]]:
    found = {}
    for dim, kept in _expect(values, dict, f"'buffers' of '{path:.80}'").items():
        if not str(dim).isascii() or not str(dim).isdigit() or len(str(dim)) > 2:
            raise CheckpointError(f"malformed plan: {path:.80} has no dimension {dim!r:.80}")
        kept = _expect(kept, list, f"what is kept of '{path:.80}'")
        if not all(_integer(index) and index >= 0 for index in kept) or len(set(kept)) != len(kept):
            raise CheckpointError(f"malformed plan: what is kept of '{path:.80}' is no list of different indices")
        found[int(dim)] = list(kept)
    return found


def _key(key: Any) -> str:
    parts = key.split(".") if isinstance(key, str) else [""]
    if not all(part.isidentifier() and not part.startswith("_") and part not in _RESERVED for part in parts):
        raise CheckpointError(f"malformed plan: {key!r:.80} is no key of a config")
    return key


def _json(key: Any, value: Any, depth: int = 0) -> Any:
    """A value of a config, if it is plain data."""
    if isinstance(value, list | dict) and depth < _DEPTH:
        items = value.values() if isinstance(value, dict) else value
        for item in items:
            _json(key, item, depth + 1)
        if isinstance(value, list) or all(isinstance(name, str) for name in value):
            return value
    elif value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise CheckpointError(f"malformed plan: the config's {key:.80} is {value!r:.80}, which is no plain value")
