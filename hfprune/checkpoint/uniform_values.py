"""Values of a config from which the stock class may build a smaller model: guessed from what changed, then tried."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from hfprune.checkpoint.configs import config_values, set_config
from hfprune.checkpoint.internals import skeleton
from hfprune.errors import CheckpointError

Place = tuple[str, str, int]
"""Module path, name of a parameter or attribute, and dimension; -1 for an attribute."""

_HEAD_SIZES = ("head_dim", "d_kv", "attention_head_size")
_INNER_SIZE = "n_inner"
"""Keys that may be absent or None and then follow from others."""

# Keys that never say a width, by the words of their names; building the model for each takes its time.
_OTHER_WORDS = frozenset(
    (
        *("layers", "layer", "vocab", "image", "patch", "max", "position", "positions", "token", "id", "ids", "pad"),
        *("bos", "eos", "labels", "kernel", "stride", "window"),
    )
)


def uniform_values(model: Any, dense: Any) -> Iterator[dict[str, Any]]:
    """Changes of the dense config that may describe the model, the likeliest first.

    What a number of the config decides is seen by building the dense model on the meta device with another number in
    its place: where a dimension or a module's own number follows it, the smaller model says the new value; where they
    disagree, most of them do.

    Args:
        model: the smaller model.
        dense: the config that its dense form is built from, apart from dropped blocks.
    """
    now = _sizes(model)
    heads = {value for (_, name, _), value in now.items() if name in _HEAD_SIZES}
    # A head size that is said outright no longer follows from the width.
    for extra in ({}, *({key: size} for key in _HEAD_SIZES for size in sorted(heads))):
        config = _plain(dense)
        try:
            set_config(config, extra)
            before = _sizes(skeleton(type(model), config))
        except CheckpointError:
            continue
        if before.keys() != now.keys():
            continue
        found = dict(extra)
        for key, value in _numbers(config):
            votes = Counter(_followers(model, config, before, now, key, value))
            if votes and (new := votes.most_common(1)[0][0]) != value:
                found[key] = new
        if found:
            yield found
            for size in sorted(set(now.values()) - set(before.values())) if not extra else ():
                yield found | {_INNER_SIZE: size}


def _followers(
    model: Any, dense: Any, before: dict[Place, int], now: dict[Place, int], key: str, value: int
) -> list[int]:
    """The new values of a config's number, by the places whose sizes follow it; those that equal it count first."""
    for other in (2 * value, max(1, value // 2)):
        config = _plain(dense)
        set_config(config, {key: other})
        try:
            changed = _sizes(skeleton(type(model), config))
        except CheckpointError:
            continue
        follow = [place for place, size in before.items() if size and changed.get(place) == size * other / value]
        equal = [now[place] for place in follow if before[place] == value]
        shares = [divmod(now[place] * value, before[place]) for place in follow]
        return equal or [share for share, rest in shares if rest == 0]
    return []


def try_values(model: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Sets values of the model's config; gives those that it had."""
    had = config_values(model.config, values)
    set_config(model.config, values)
    return had


def _plain(config: Any) -> Any:
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _sizes(model: nn.Module) -> dict[Place, int]:
    """Every dimension of every parameter, and every whole number that a module holds."""
    found: dict[Place, int] = {}
    for path, module in model.named_modules():
        for name, tensor in module.named_parameters(recurse=False):
            found |= {(path, name, dim): size for dim, size in enumerate(tensor.shape)}
        found |= {(path, name, -1): value for name, value in vars(module).items() if type(value) is int}
    return found


def _numbers(config: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    for key, value in vars(config).items():
        words = set(key.split("_"))
        if type(value) is int and value > 1 and not key.startswith("_") and not words & _OTHER_WORDS:
            yield prefix + key, value
        elif hasattr(value, "attribute_map"):
            yield from _numbers(value, f"{prefix}{key}.")
