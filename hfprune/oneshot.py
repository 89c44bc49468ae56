"""prune(): score, select, apply; no training."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table
from torch import nn

from hfprune.checkpoint.metadata import annotate, block_of, masks_from_block, plan_of
from hfprune.checkpoint.torch_prune import refuse_torch_prune
from hfprune.config import PruningConfig
from hfprune.criteria import create
from hfprune.criteria.calibration import LossFunction, Progress, example_inputs_of
from hfprune.errors import ConfigError
from hfprune.lowrank.pruner import pruner_for
from hfprune.masks import MaskSet
from hfprune.offloading import onloaded, refuse_offloaded
from hfprune.originals import Originals
from hfprune.pruner import Pruner
from hfprune.structure.record import followed_by


@dataclass(frozen=True)
class PruneReport:
    """What `prune` did.

    Attributes:
        masks: what is held at zero; `masks.enforce()` after an optimizer step keeps it so.
        achieved: the fraction that is gone, of what the target measures.
        units: how many units there were, and `pruned` how many are gone.
        plan: the record of physical removals; empty for masks.
        groups: for removals: group name to its units before and after.
        note: where the target was not met within 2 %: what stood in the way; and what could not be cut, and why.
    """

    masks: MaskSet
    achieved: float
    units: int
    pruned: int
    plan: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, tuple[int, int]] = field(default_factory=dict)
    note: str = ""

    def table(self) -> Table:
        """One row a layer or group; printable by rich."""
        title = f"{self.pruned:,} of {self.units:,} units pruned ({self.pruned / max(1, self.units):.2%})"
        table = Table(title=title, title_justify="left")
        if self.groups:
            for column, side in (("group", "left"), ("units", "right"), ("kept", "right"), ("gone", "right")):
                table.add_column(column, justify=side)
            for name, (before, after) in self.groups.items():
                table.add_row(name, f"{before:,}", f"{after:,}", f"{1 - after / before:.1%}")
            return table
        for column, side in (("layer", "left"), ("elements", "right"), ("zeros", "right"), ("sparsity", "right")):
            table.add_column(column, justify=side)
        for name, layer in self.masks.sparsity().items():
            table.add_row(name, f"{layer.numel:,}", f"{layer.zeros:,}", f"{layer.zeros / layer.numel:.1%}")
        return table


def prune(
    model: nn.Module,
    config: PruningConfig,
    data: Any = None,
    *,
    loss: LossFunction | None = None,
    example_inputs: Any = None,
    progress: Progress | None = None,
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
        example_inputs: for structural granularities: a tensor, a tuple or a dict of keyword arguments that the model
            takes; for `synflow` with all. May be left out for transformers and timm models, and where `data` has
            batches.
        progress: wraps the calibration batches to show how far they are; `rich.progress.track` fits.

    Returns:
        The report, with the masks or the plan.

    Raises:
        ConfigError: the configuration does not fit the model, or the criterion lacks data.
        ModelError: the model can't take a batch, a score is not a number, its structure can't be analysed, or a removal
            does not prove equal; or the model is under torch.nn.utils.prune (`import_torch_prune`), or offloaded so
            that it can't be pruned where it lies.
    """
    refuse_torch_prune(model)
    if config.strategy is not None:
        raise ConfigError("pruning.strategy: fine-tuning between steps needs PruningTrainer; leave the strategy out")
    _refuse_offloaded(model, config)
    if config.is_structural:
        return _remove(model, config, data, loss, example_inputs, progress)
    with onloaded(model):
        return _mask(model, config, data, loss, example_inputs, progress)


def _refuse_offloaded(model: nn.Module, config: PruningConfig) -> None:
    """Refuses what runs a model whose parameters are elsewhere until it runs."""
    criterion = create(config.criterion_name, config.criterion_parameters)
    if config.is_structural:
        refuse_offloaded(model, "what is removed is proved by running the model")
    elif criterion.statistics or criterion.layerwise:
        refuse_offloaded(model, f"'{config.criterion_name}' runs the model while it looks at them")


def _remove(
    model: nn.Module,
    config: PruningConfig,
    data: Any,
    loss: LossFunction | None,
    example_inputs: Any,
    progress: Progress | None,
) -> PruneReport:
    if example_inputs is None:
        example_inputs = example_inputs_of(data)
    block, before = block_of(model), plan_of(model)
    masks = masks_from_block(model, block) if block else MaskSet({})
    pruner = pruner_for(model, config, example_inputs, masked=masks)
    targets = pruner.targets()
    if hasattr(data, "__next__"):  # every step scores on the same batches
        data = list(itertools.islice(data, pruner.criterion.batches))
    try:
        for target in targets:
            choice = pruner.step(target, data=data, loss=loss, progress=progress)
        masks = MaskSet.from_zeros(model, list(masks), masks.pattern) if len(masks) else masks
        plan = pruner.plan if before is None else followed_by(before, pruner.plan)
        annotate(model, config, masks, achieved=choice.reached, plan=plan)
    except BaseException:
        pruner.undo()
        raise
    gone = pruner.gone_units()
    notes = [choice.note] if choice.note else []
    notes += [f"some groups stay whole: {reason}" for reason in pruner.uncut()[:3]]
    return PruneReport(
        masks, choice.reached, pruner.total_units, gone, plan.to_dict(), pruner.group_sizes(), "\n".join(notes)
    )


def _mask(
    model: nn.Module,
    config: PruningConfig,
    data: Any,
    loss: LossFunction | None,
    example_inputs: Any,
    progress: Progress | None,
) -> PruneReport:
    pruner = Pruner(model, config)
    if config.schedule.every is not None:
        raise ConfigError("pruning.schedule.every: pruning inside a training run needs PruningTrainer")
    targets = config.targets()
    if len(targets) > 1 and hasattr(data, "__next__"):  # every step scores on the same batches
        data = list(itertools.islice(data, pruner.criterion.batches))
    block = block_of(model)
    masks = masks_from_block(model, block) if block else MaskSet({})
    if pruner.visits:
        return _visit(model, config, pruner, masks, data, loss)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    backup, lost = {}, {}
    if len(targets) > 1:
        backup = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        for target in targets:
            masks = pruner.select(target, masks, data=data, loss=loss, example_inputs=example_inputs, progress=progress)
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
    return _report(pruner, masks, targets[-1])


def _visit(
    model: nn.Module, config: PruningConfig, pruner: Pruner, masks: MaskSet, data: Any, loss: LossFunction | None
) -> PruneReport:
    """Masks by a criterion that prunes layer after layer, and may change the weights that stay."""
    targets = config.targets()
    with Originals() as originals:
        try:
            for target in targets:
                masks = pruner.visit(target, masks, originals, data=data, loss=loss).apply(model)
            annotate(model, config, masks, achieved=targets[-1])
        except BaseException:
            originals.restore()
            raise
    return _report(pruner, masks, targets[-1])


def _report(pruner: Pruner, masks: MaskSet, target: float) -> PruneReport:
    pruned = max(pruner.wanted(target), pruner.gone(masks))
    return PruneReport(masks, pruned / pruner.total_units, pruner.total_units, pruned)
