"""Measuring a finished checkpoint's metric again, to compare it with what its report says."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfprune.analysis.setting import open_setting
from hfprune.checkpoint.load import from_pretrained
from hfprune.data.builtin import builtin
from hfprune.errors import CheckpointError
from hfprune.hub.card import RECIPE_FILE, REPORT_FILE
from hfprune.hub.reach import looks_like_path
from hfprune.metrics import metrics
from hfprune.recipe import Recipe
from hfprune.report.tables import title

# Another machine rounds differently, and a few examples may fall on the other side.
_SHARE, _POINTS = 0.01, 0.002


@dataclass
class Remeasured:
    """A metric, as the report says it and as it was measured now.

    Attributes:
        name: the metric.
        recorded, measured: its values.
        ok: whether they agree: to 0.2 points of a fraction, or to one part in a hundred.
        why_not: why nothing was measured; None where it was.
    """

    name: str = ""
    recorded: float = math.nan
    measured: float = math.nan
    why_not: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against the report."""
        close = math.isclose(self.recorded, self.measured, rel_tol=_SHARE, abs_tol=_POINTS)
        return self.why_not is not None or close

    def words(self) -> str:
        """What was found, for a person."""
        if self.why_not is not None:
            return f"the metric was not measured again: {self.why_not}"
        return f"{title(self.name)} {self.measured:.6g} measured now, {self.recorded:.6g} in the report"

    def raise_if_bad(self, checkpoint: str | Path) -> None:
        """Raises a CheckpointError where the report says another value."""
        if not self.ok:
            raise CheckpointError(f"'{checkpoint}' does not reach what its report says: {self.words()}")


def remeasure(folder: Path, recipe: Path | None = None) -> Remeasured:
    """Evaluates a checkpoint on the data of its recipe.

    A checkpoint's own recipe is followed only as far as it runs no code and needs no network: built-in data or data on
    this machine, built-in metrics, models of transformers and timm. A recipe of the user's is followed wherever it
    leads.

    Args:
        folder: the checkpoint, with the `pruning_report.json` and, where no recipe is given, the `recipe.yaml` of the
            run that left it.
        recipe: the user's.

    Raises:
        CheckpointError: the report can't be read.
        HfpruneError: the recipe given does not fit.
    """
    report = _report(folder)
    if report is None:
        return Remeasured(why_not="there is no pruning_report.json to compare with")
    name, recorded = report.get("main_metric"), (report.get("pruned") or {}).get("metric") or {}
    if not isinstance(recorded.get(name), int | float):
        return Remeasured(why_not="the report holds no metric")
    path = recipe or folder / RECIPE_FILE
    if not path.is_file():
        return Remeasured(why_not="there is no recipe.yaml that says the data; give --recipe FILE")
    given = Recipe.from_yaml(path)
    if recipe is None and (reason := _reason_not_to(given)):
        return Remeasured(why_not=f"{reason}; give --recipe FILE to do it all the same")
    overrides = [f"training.seed={report['seed']}"] if type(report.get("seed")) is int else []
    if _is_own(given.model.name):
        at = open_setting(None, path, None, overrides)
        model = from_pretrained(folder, at.model, check=False)
    else:
        at = open_setting(str(folder), path, None, overrides)
        model = at.model
    return Remeasured(name, float(recorded[name]), float(at.evaluate(model)[name]))


def _reason_not_to(recipe: Recipe) -> str | None:
    """Why a recipe that came with a checkpoint is not followed."""
    if _is_own(recipe.model.name):
        return f"its model is made by code that it names, '{recipe.model.name}'"
    foreign = [name for name in recipe.data.metrics or [] if name not in metrics]
    if foreign:
        return f"its metric '{foreign[0]}' is code from elsewhere"
    name = recipe.data.name
    if name in builtin or Path(name).expanduser().exists():
        return None
    return f"its data '{name}' is {'not here' if looks_like_path(name) else 'on the Hub'}"


def _is_own(name: str) -> bool:
    return not Path(name).exists() and re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) is not None


def _report(folder: Path) -> dict[str, Any] | None:
    path = folder / REPORT_FILE
    if not path.is_file():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"'{path}' can't be read: {error}") from error
    if not isinstance(report, dict) or not all(isinstance(report.get(k, {}), dict) for k in ("pruned", "dense")):
        raise CheckpointError(f"'{path}' can't be read: it is no report")
    return report
