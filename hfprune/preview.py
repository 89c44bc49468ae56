"""What a recipe would do, before it does anything: the table of a dry run."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table

from hfprune.profiling import human_count
from hfprune.report.tables import GONE, removed_table
from hfprune.training.removal import Removal
from hfprune.training.trainer import PruningTrainer


def preview(trainer: PruningTrainer) -> Any:
    """What a recipe would do, for `rich.print`: one row a pruning step and, for removals, one a group. The model is not
    changed."""
    if isinstance(trainer.method, Removal):
        return _removals(trainer, trainer.method)
    pruner = trainer.pruner
    table = _steps(f"{len(pruner.weights)} weights, {pruner.total_units:,} units", "units gone")
    for target in trainer.method.targets():
        _add(table, trainer, target, f"{pruner.wanted(target):,}")
    return table


def _removals(trainer: PruningTrainer, method: Removal) -> Any:
    dense = method.pruner.dense
    blocks = f", {dense.blocks} residual blocks" if dense.blocks else ""
    size = f"{dense.params:,.0f} parameters, {human_count(dense.macs)} MACs"
    table = _steps(f"{len(dense.units)} groups of {sum(dense.units.values()):,} units{blocks}; {size}", None)
    targets = method.targets()
    for target in targets:
        _add(table, trainer, target, None)
    report, step = method.preview(targets[-1])
    left = [
        f"{name} {value:,} of {before:,.0f} ({value / before:.1%})"
        for name, value, before in (("parameters", step["params"], dense.params), ("MACs", step["macs"], dense.macs))
        if before
    ]
    lines = ["by the scores of the weights as they are now, this would go:", removed_table(report)]
    return Group(table, *lines, f"left: {', '.join(left)}", *([step["note"]] if step["note"] else []))


def _steps(title: str, heading: str | None) -> Table:
    table = Table(title=title, title_justify="left")
    for column in filter(None, ("step", "target", heading, "recovery")):
        table.add_column(column, justify="left" if column == "recovery" else "right")
    return table


def _add(table: Table, trainer: PruningTrainer, target: float, gone: str | None) -> None:
    recovery, index = trainer.pruning.recovery, table.row_count
    said = {name: recovery.value(name, index) for name in ("epochs", "steps", "patience", "learning_rate")}
    words = ", ".join(f"{name} {value:g}" for name, value in said.items() if value is not None)
    measured = f" {GONE[trainer.method.measured]}" if gone is None else ""
    cells = [f"{target:.2%}{measured}", *([gone] if gone is not None else [])]
    if (strategy := trainer.pruning.strategy) is not None and strategy.trigger is not False:
        words = f"{words or 'one epoch'}, where {strategy.trigger} or more are lost"
    step = f"{index + 1} {trainer.phases[index].block}".strip()
    table.add_row(step, *cells, words or ("one epoch" if strategy is not None else "as training says"))
