"""What a checkpoint says of itself in config.json, for a person to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from hfprune.checkpoint.metadata import read_block, read_config
from hfprune.errors import CheckpointError
from hfprune.hub.loading import loading_lines
from hfprune.hub.reach import folder_of
from hfprune.report.tables import sparsity_table

_LEFT = {"params": "of the parameters", "macs": "of the multiply-accumulates", "latency": "of the time"}


def facts(name: str | Path, revision: str | None = None, most: int = 40) -> RenderableType:
    """The sparsity metadata of a checkpoint: base model, what was done, zeros a tensor, plan, how to load it.

    Args:
        name: a folder, or a repository on the Hub, of which only config.json is fetched.
        revision: a branch, tag or commit of the repository.
        most: rows of the table of tensors; the largest are shown.

    Returns:
        Something to print with rich.

    Raises:
        CheckpointError: it is no checkpoint, has no hfprune block, or one of a newer format.
        NotReachable: the repository could not be had.
    """
    folder = folder_of(name, revision, ["config.json"])
    block = read_block(folder)
    if block is None:
        raise CheckpointError(f"'{name}' has no pruning metadata: hfprune did not write it, or pruned nothing")
    parts: list[RenderableType] = [Text("\n".join([f"{name}", *_lines(block)]))]
    if block.get("sparsity"):
        parts.append(sparsity_table(block, most))
    if block.get("plan"):
        parts.append(Text("\n".join(_plan(block["plan"]))))
    lines = loading_lines(read_config(folder), str(name), on_hub=not Path(name).exists(), revision=revision)
    parts.append(Text("\n".join(["to load it:", "", *(f"    {line}" for line in lines.splitlines())])))
    return Group(*parts)


def _lines(block: dict[str, Any]) -> list[str]:
    """What was done, a line a fact; what the block does not say is left out."""
    done = block.get("pruning")
    done = done if isinstance(done, dict) else {}
    lines = [("base model", done.get("base_model")), ("granularity", done.get("granularity"))]
    lines += [(key, done.get(key)) for key in ("criterion", "scope", "schedule")]
    lines += [("target", _share(done.get("target"))), ("reached", _share(done.get("reached")))]
    encodings = block.get("encodings")
    if isinstance(encodings, dict) and encodings:
        lines.append(
            ("stored sparse", f"{len(encodings)} tensors ({', '.join(sorted(set(map(str, encodings.values()))))})")
        )
    lines.append(("format", f"{block['format_version']}, written by hfprune {block.get('version', '?')}"))
    return [f"  {label:<14} {_words(value)}" for label, value in lines if value not in (None, "", {})]


def _share(target: Any) -> str | None:
    """`{"macs": 0.5}` as '50.0 % of the multiply-accumulates left'."""
    if not isinstance(target, dict):
        return None
    found = []
    for kind, value in target.items():
        if isinstance(value, int | float) and 0 <= value <= 1:
            found.append(f"{100 * value:.4g} % {f'{_LEFT[kind]} left' if kind in _LEFT else 'gone'}")
        else:
            found.append(f"{kind} {value}")
    return ", ".join(found)


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(inner)}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _plan(plan: dict[str, Any]) -> list[str]:
    """What is gone from the structure: the block's plan has been checked when it was read."""
    dense = plan.get("dense_config") or {}
    lines = [f"  {key:<14} {dense.get(key, '?')} before, {value} now" for key, value in plan.get("config", {}).items()]
    if plan.get("dropped"):
        lines.append(f"  blocks dropped {', '.join(plan['dropped'])}")
    uneven = {name.rpartition(".")[2] for values in plan.get("attributes", {}).values() for name in values}
    if uneven:
        lines.append(f"  uneven         {len(plan['attributes'])} modules differ in {', '.join(sorted(uneven))}")
    return ["removed from the structure:", *(lines or ["  sizes alone: they stand in the tensors' shapes"])]
