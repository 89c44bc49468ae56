"""prune(): score, select, apply; no training."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table
from torch import nn

from hfprune.checkpoint.metadata import annotate, block_of, masks_from_block
from hfprune.config import PruningConfig
from hfprune.criteria.calibration import LossFunction
from hfprune.errors import ConfigError
from hfprune.masks import MaskSet
from hfprune.pruner import Pruner


@dataclass(frozen=True)
class PruneReport:
    """What `prune` did.

    Attributes:
        masks: what is held at zero; `masks.enforce()` after an optimizer step keeps it so.
        achieved: the fraction of units that is gone.
        units: how many units there were, and `pruned` how many are gone.
        plan: the record of physical removals; empty for masks.
    """

    masks: MaskSet
    achieved: float
    units: int
    pruned: int
    plan: dict[str, Any] = field(default_factory=dict)

    def table(self) -> Table:
        """One row a layer: elements, zeros and their fraction; printable by rich."""
        title = f"{self.pruned:,} of {self.units:,} units pruned ({self.achieved:.2%})"
        table = Table(title=title, title_justify="left")
        for column, side in (("layer", "left"), ("elements", "right"), ("zeros", "right"), ("sparsity", "right")):
            table.add_column(column, justify=side)
        for name, layer in self.masks.sparsity().items():
            table.add_row(name, f"{layer.numel:,}", f"{layer.zeros:,}", f"{layer.zeros / layer.numel:.1%}")
        return table


def prune(
    model: nn.Module, config: PruningConfig, data: Any = None, *, loss: LossFunction | None = None
) -> PruneReport:
    """Prunes a model in place, without training. If it raises, the model is unchanged.

    Example:
        >>> report = hfprune.prune(model, hfprune.PruningConfig(criterion="l1", target=0.5))
        >>> rich.print(report.table())

    Args:
        model: any module.
        config: what goes; a schedule of several steps scores anew after each. `recovery` plays no part.
        data: for criteria that need it: a batch (a tensor, a pair `(inputs, labels)`, a dict that goes to the model
            whole) or an iterable of batches.
        loss: from the model and a batch to a scalar; by default the model's own loss, or cross entropy with the labels.

    Returns:
        The report, with the masks.

    Raises:
        ConfigError: the configuration does not fit the model, or the criterion lacks data.
        ModelError: the model can't take a batch, or a score is not a number.
    """
    pruner = Pruner(model, config)
    if config.schedule.every is not None:
        raise ConfigError("pruning.schedule.every: pruning inside a training run needs PruningTrainer")
    targets = config.targets()
    if len(targets) > 1 and hasattr(data, "__next__"):  # every step scores on the same batches
        data = list(itertools.islice(data, pruner.criterion.batches))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    backup, lost = {}, {}
    if len(targets) > 1:
        backup = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    block = block_of(model)
    masks = masks_from_block(model, block) if block else MaskSet({})
    try:
        for target in targets:
            masks = pruner.select(target, masks, data=data, loss=loss)
            if not backup:  # one step: what it removes is all there is to put back
                lost = {name: (~mask, parameters[name].detach()[~mask]) for name, mask in masks.kept.items()}
            masks.apply(model)
        annotate(model, config, masks, achieved=targets[-1])
    except BaseException:
        with torch.no_grad():
            for name, value in backup.items():
                parameters[name].copy_(value)
            for name, (places, values) in lost.items():
                parameters[name][places] = values
        raise
    pruned = max(pruner.wanted(targets[-1]), pruner.gone(masks))
    return PruneReport(masks, pruned / pruner.total_units, pruner.total_units, pruned)
