"""The plan of several steps in a row, written in the paths and indices of the dense model."""

from __future__ import annotations

from typing import Any

from torch import nn

from hfprune.structure.plan import Plan
from hfprune.structure.removal import Removal


def record_removal(plan: Plan, model: nn.Module, removal: Removal) -> None:
    """Adds a removal to the plan.

    Args:
        plan: of the steps before; extended in place.
        model: as it is after the removal.
        removal: what it changed.
    """
    for path, attributes in removal.attributes.items():
        plan.attributes.setdefault(dense_path(plan, path), {}).update(attributes)
    saved = set(model.state_dict().keys())
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)} - saved
    for name in buffers & removal.kept.keys():
        before = plan.buffers.setdefault(dense_path(plan, name), {})
        for dim, kept in removal.kept[name].items():
            indices = kept.tolist()
            before[dim] = [before[dim][index] for index in indices] if dim in before else indices


def record_dropped(plan: Plan, paths: list[str], config: dict[str, tuple[Any, Any]]) -> None:
    """Adds dropped blocks to the plan.

    Args:
        plan: of the steps before; extended in place.
        paths: those that the blocks had before they were dropped.
        config: key to the value of the model's config before and after.
    """
    plan.dropped += [dense_path(plan, path) for path in paths]
    for key, (before, after) in config.items():
        plan.dense_config = {key: before} | (plan.dense_config or {})
        plan.config[key] = after


def followed_by(first: Plan, second: Plan) -> Plan:
    """One plan for two prunings: the second was made on the model that the first left.

    Args:
        first: in the paths of the dense model.
        second: in the paths of the model that the first left.
    """
    attributes = {path: dict(values) for path, values in first.attributes.items()}
    for path, values in second.attributes.items():
        attributes.setdefault(dense_path(first, path), {}).update(values)
    buffers = {path: dict(cut) for path, cut in first.buffers.items()}
    for path, cut in second.buffers.items():
        before = buffers.setdefault(dense_path(first, path), {})
        for dim, kept in cut.items():
            before[dim] = [before[dim][index] for index in kept] if dim in before else list(kept)
    dense = None
    if first.dense_config is not None or second.dense_config is not None:
        dense = (second.dense_config or {}) | (first.dense_config or {})
    dropped = first.dropped + [dense_path(first, path) for path in second.dropped]
    factored = first.factored | {dense_path(first, path): rank for path, rank in second.factored.items()}
    return Plan(attributes, buffers, dropped, first.config | second.config, dense, factored)


def dense_path(plan: Plan, path: str) -> str:
    """The path that a module has in the dense model, where dropped blocks are still counted."""
    parts = path.split(".")
    for place, part in enumerate(parts):
        container = ".".join(parts[:place])
        gone = {p.rpartition(".")[2] for p in plan.dropped if p.rpartition(".")[0] == container}
        if part.isdigit() and gone and all(name.isdigit() for name in gone):
            index, left = -1, int(part) + 1
            while left:
                index += 1
                left -= str(index) not in gone
            parts[place] = str(index)
    return ".".join(parts)
