"""What a checkpoint says of itself in config.json, for a person to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Group, RenderableType
from rich.text import Text

from hfprune.checkpoint.metadata import MARKER, read_block
from hfprune.config import PruningConfig
from hfprune.errors import CheckpointError
from hfprune.hub.card import Kind, render_card
from hfprune.hub.reach import folder_of
from hfprune.report.tables import sparsity_table

_TASKS = ("ImageClassification", "SequenceClassification", "CausalLM")
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
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    parts: list[RenderableType] = [Text("\n".join([f"{name}", *_lines(block)]))]
    if block.get("sparsity"):
        parts.append(sparsity_table(block, most))
    if block.get("plan"):
        parts.append(Text("\n".join(_plan(block["plan"]))))
    lines = loading(config, str(name), revision, on_hub=not Path(name).exists())
    parts.append(Text("\n".join(["to load it:", "", *(f"    {line}" for line in lines)])))
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


def loading(config: dict[str, Any], name: str, revision: str | None = None, *, on_hub: bool) -> list[str]:
    """The lines of Python that load a checkpoint, from its config.json.

    Args:
        config: the values of config.json.
        name: a folder, or a repository's id.
        revision: of the repository.
        on_hub: which of the two it is.
    """
    quoted = json.dumps(name) + (f", revision={json.dumps(revision)}" if revision else "")
    kind = (config.get("architectures") or ["MyModel"])[0]
    if "model_type" not in config:
        own = kind.rpartition(":")[2] or kind
        return ["import hfprune", "", f"model = hfprune.from_pretrained({quoted}, model={own})"]
    head = next((f"AutoModelFor{task}" for task in _TASKS if kind.endswith(f"For{task}")), kind)
    lines = [f"from transformers import {head}", "", f"model = {head}.from_pretrained({quoted})"]
    needs_us = (config.get("quantization_config") or {}).get("quant_method") == MARKER["quant_method"]
    if needs_us:
        lines.insert(0, "import hfprune")
    if config.get("auto_map"):
        plain = f"model = {head}.from_pretrained({quoted}, trust_remote_code=True)"
        lines += ["", "# where hfprune is not installed; runs the modeling file of the checkpoint", plain]
    if not needs_us and config["model_type"] == "timm_wrapper":
        place = f"hf-hub:{name}{f'@{revision}' if revision else ''}" if on_hub else f"local-dir:{name}"
        lines += ["", "# or with timm alone", "import timm", ""]
        lines += [f"model = timm.create_model({json.dumps(place)}, pretrained=True)"]
    return lines


def recorded_card(folder: Path, repo: str) -> str | None:
    """A card for a checkpoint that has none, from what its config.json says; None where that says nothing of pruning.

    Args:
        folder: the checkpoint.
        repo: the repository's id.
    """
    block = read_block(folder)
    if block is None:
        return None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    done = block.get("pruning")
    done = done if isinstance(done, dict) else {}
    pruning = {key: done[key] for key in ("criterion", "granularity", "scope", "schedule", "target") if key in done}
    report = {
        "sparsity": block.get("sparsity") or {},
        "recipe": {"pruning": pruning} if _is_known(pruning) else {},
        "base_model": done.get("base_model"),
        "environment": {"hfprune": block.get("version")},
    }
    lines = "\n".join(loading(config, repo, on_hub=True))
    return render_card(report, recipe_yaml=None, kind=kind_of(config), loading=lines, name=repo.rpartition("/")[2])


def _is_known(pruning: dict[str, Any]) -> bool:
    """Whether a card can put it into words: not where it names a criterion that was registered elsewhere."""
    try:
        PruningConfig.model_validate(pruning)
    except ValidationError:
        return False
    return bool(pruning)


def kind_of(config: dict[str, Any]) -> Kind:
    """Which library loads a checkpoint with this config.json."""
    found: dict[Any, Kind] = {"timm_wrapper": "timm", None: "module"}
    return found.get(config.get("model_type"), "transformers")
