"""What was done to a model, in the plain words of its card."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hfprune.config import PruningConfig, Recovery
from hfprune.granularity import Granularity, parse_granularity
from hfprune.report.tables import main_metric, metrics, percent, title

_SCOPES = {
    "global": "all layers ranked together",
    "layer": "every layer by the same fraction",
    "isomorphic": "layers of the same shape ranked together",
}
_UNITS = {
    "channel": "channels",
    "head": "attention heads",
    "head_dim": "dimensions of attention heads",
    "neuron": "feed-forward neurons",
    "width": "channels of the residual stream",
    "layer": "whole residual blocks",
    "rank": "components of weights that are now products of two",
}
_MEASURES = {"params": "parameters", "macs": "multiply-accumulates", "latency": "time of a forward pass"}


def method(pruning: PruningConfig, report: Mapping[str, Any]) -> list[str]:
    """Sentences on what went, by what rule, and in how many steps."""
    targets = [step["target"] for step in report.get("steps") or []]
    if pruning.target is None or pruning.target.fraction is not None:
        targets = pruning.targets()
    steps = "in one step" if len(targets) <= 1 else f"in {len(targets)} steps to {_listed(targets)}"
    words = f"the least important first by the criterion {code(pruning.criterion_name)}"
    scope = f"{_SCOPES[pruning.scope]} (scope {code(pruning.scope)})"
    if pruning.is_structural and pruning.target.kind in _MEASURES and len(targets) > 1:
        steps += f" of the {_MEASURES[pruning.target.kind]} gone"
    kind = f"schedule {code(pruning.schedule.kind)}" if pruning.export_sizes is None else "one for each exported size"
    went = f"Pruning went {steps} ({kind})"
    each = ", followed by fine-tuning" if len(targets) <= 1 else ", each followed by fine-tuning"
    tuned = _recovery(pruning.recovery)
    if pruning.is_structural:
        units = " and ".join(_UNITS[name] for name in pruning.granularities)
        what = f"Removed were {units}, {words}, {scope}: the tensors are smaller, and nothing is left in their place."
    else:
        shape = parse_granularity(pruning.granularity)
        # A pattern decides within each of its groups, whatever the scope.
        ranked = words if shape.kind == "n:m" else f"{words}, {scope}"
        what = f"Set to zero were {_granularity(shape)}, {ranked}."
    return [
        what,
        f"{went}{f'{each} {tuned}' if tuned else ''}.",
    ]


def trained_first(recipe: Mapping[str, Any]) -> list[str]:
    """A sentence on the dense model where the same run trained it."""
    baseline = recipe.get("baseline")
    if not baseline:
        return []
    epochs = baseline.get("epochs")
    length = f"{epochs:g} epochs" if epochs else f"{baseline.get('max_steps')} optimizer steps"
    drawn = ", from random weights" if (recipe.get("model") or {}).get("pretrained") is False else ""
    return [f"Before that the dense model was trained for {length}{drawn}."]


def _recovery(recovery: Recovery) -> str:
    """Such as 'for at most 12 epochs, ended after 6, then 3 evaluations without improvement'; empty if not said."""

    def then(value: Any) -> str:
        return ", then ".join(f"{one:g}" for one in (value if isinstance(value, list) else [value]))

    length = next(((getattr(recovery, name), name) for name in ("epochs", "steps") if getattr(recovery, name)), None)
    parts = []
    if length:
        parts.append(f"for {'at most ' if recovery.patience else ''}{then(length[0])} {length[1]}")
    if recovery.patience:
        parts.append(f"ended after {then(recovery.patience)} evaluations without improvement")
    return ", ".join(parts)


def _granularity(shape: Granularity) -> str:
    if shape.kind == "n:m":
        gone = shape.group - shape.kept
        return (
            f"{gone} of every {shape.group} neighbouring weights along the input dimension ({shape.kept}:{shape.group})"
        )
    if shape.kind == "block":
        return f"blocks of {shape.rows} x {shape.cols} weights"
    return "single weights, wherever they lie"


def _listed(targets: Sequence[float]) -> str:
    shown = [f"{100 * target:.4g} %" for target in targets]
    return f"{', '.join(shown[:-1])} and {shown[-1]}"


def removed(report: Mapping[str, Any]) -> list[str]:
    """Sentences that count what is gone; none where nothing was removed."""
    found = report.get("removed")
    if not found:
        return _reached(report) if report.get("plan") else []
    kinds: dict[str, list[int]] = {}
    for group in found["groups"].values():
        counts = kinds.setdefault(group["kind"], [0, 0])
        counts[0] += group["units"] - group["kept"]
        counts[1] += group["units"]
    parts = [f"{gone:,} of {total:,} {_UNITS[kind]}" for kind, (gone, total) in kinds.items()]
    if found["blocks"]:
        parts.append(f"{len(found['dropped'])} of {found['blocks']} residual blocks")
    dense, pruned = report.get("dense") or {}, report.get("pruned") or {}
    left = [
        f"{percent(pruned[key] / dense[key])} of the {words}"
        for key, words in (("params", "parameters"), ("macs", "multiply-accumulates"))
        if dense.get(key) and pruned.get(key) is not None
    ]
    sentence = f"{' and '.join(filter(None, (', '.join(parts[:-1]), parts[-1])))} are gone"
    return [f"{sentence}; {' and '.join(left)} are left." if left else f"{sentence}.", *_sizes(report)]


def _sizes(report: Mapping[str, Any]) -> list[str]:
    """A sentence on the other sizes that the run left."""
    name = main_metric(report)
    members = [
        f"{percent(member['size'])} ({title(name)} {metrics(member['metric'])[name]:.4g})"
        for member in report.get("sizes") or []
        if member["size"] < 1 and name in metrics(member.get("metric"))
    ]
    return [f"The same run left checkpoints of {len(members)} sizes: {', '.join(members)}."] if members else []


def _reached(report: Mapping[str, Any]) -> list[str]:
    """What the checkpoint itself records, where no run counted the units."""
    reached = report.get("reached") or {}
    if "ratio" in reached:
        return [f"{percent(reached['ratio'])} of the units are gone."]
    return [f"{percent(reached[key])} of the {words} are left." for key, words in _MEASURES.items() if key in reached]


def code(text: str) -> str:
    """Text as code in Markdown."""
    mark, text = fence(text, 1), " ".join(text.split())
    return f"{mark} {text} {mark}" if "`" in text else f"{mark}{text}{mark}"


def fence(text: str, least: int) -> str:
    """Backticks enough that none inside the text can close them."""
    return "`" * max(least, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
