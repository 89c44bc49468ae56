"""ICE-Pruning inside a trainer: when a step is fine-tuned, which layers are frozen, and at which learning rate.

Source: ICE-Pruning (Hu, Henderson, Cano, arXiv 2505.07411).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from hfprune.errors import ConfigError
from hfprune.report.tables import short_paths
from hfprune.strategy import Drop, Ice
from hfprune.training.ice.side import side_trainer
from hfprune.training.ice.tuning import check_optuna, search
from hfprune.training.phases import Phase, StepRecord
from hfprune.training.progress import shown, tell
from hfprune.training.removal import of_the_first

if TYPE_CHECKING:
    from hfprune.training.trainer import PruningTrainer

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)


class IceCourse:
    """What ICE decides on the way through a trainer's phases. What it found out lies in `trainer.progress.strategy`.

    Attributes:
        changes: how much fine-tuning changes each layer, where that is known; else `begin` finds it out.

    Args:
        trainer: with its recovery, method and phases.
        kind: the class of trainers that are run beside it.

    Raises:
        ConfigError: there is nothing to measure a drop on, or to fine-tune with; the drop's unit is not that of the
            metric.
    """

    def __init__(self, trainer: PruningTrainer, kind: type[PruningTrainer]):
        self.trainer, self.kind = trainer, kind
        self.settings: Ice = trainer.pruning.strategy
        self.changes: dict[str, float] | None = None
        key, settings = "pruning.strategy", self.settings
        if trainer.train_dataset is None:
            raise ConfigError(f"{key}: ice fine-tunes and needs a train_dataset; without one leave the strategy out")
        if settings.trigger is not False:
            self._check_drop(
                f"{key}.trigger", settings.trigger, "or say `trigger: false` to fine-tune after every step"
            )
        if settings.tune is not None:
            check_optuna()
            self._check_drop(f"{key}.tune.bound", settings.tune.bound, "or leave `tune` out")

    def _check_drop(self, key: str, drop: Drop, otherwise: str) -> None:
        recovery = self.trainer.recovery
        if recovery is None:
            raise ConfigError(f"{key}: needs an eval_dataset to measure the metric on; {otherwise}")
        recovery.check_unit(key, drop)

    @property
    def found(self) -> dict[str, Any]:
        """What is known: `dense` (the metric); from the probe `changes`, `frozen` and `probe_seconds`; from the search
        `settings`, `trials` and `tuning_seconds`."""
        return self.trainer.progress.strategy

    @property
    def now(self) -> Ice:
        """The settings that count: those searched for, where a search was made."""
        return Ice.model_validate(self.found["settings"]) if "settings" in self.found else self.settings

    # ---- before the first step ----------------------------------------------------------------------------------

    def begin(self, ignore_keys: list[str] | None) -> None:
        """Measures the dense model, finds what fine-tuning changes least, and searches for the settings."""
        trainer = self.trainer
        if trainer.recovery is not None:
            self.found["dense"] = trainer.recovery.value_of(trainer.evaluate(ignore_keys=ignore_keys))
        began = time.perf_counter()
        if self.changes is None and self.settings.freeze:
            self.changes = of_the_first(probe(self.kind, trainer, self.settings))
            self.found.update(changes=self.changes, probe_seconds=time.perf_counter() - began)
        began = time.perf_counter()
        if self.settings.tune is not None:
            tuned = search(self.kind, trainer)
            self.found.update(settings=tuned.settings.model_dump(mode="json"), trials=tuned.trials)
            self.found["tuning_seconds"] = time.perf_counter() - began
        if self.now.freeze:
            frozen = self.found["frozen"] = least_changed(self.changes, self.now.freeze)
            said = f"{len(frozen)} of {len(self.changes)} layers are frozen: those that a probe changed least"
            tell(trainer, f"ice: {said} ({self.found.get('probe_seconds', 0.0):.1f} s)")

    # ---- in a phase -----------------------------------------------------------------------------------------------

    def fine_tunes(self, phase: Phase, record: StepRecord) -> bool:
        """Whether a step is fine-tuned; enters what was decided, and why, into its record."""
        trainer, settings = self.trainer, self.now
        record.block = phase.block
        record.fine_tuned, words = True, ""
        if trainer.recovery is not None and trainer.recovery.best is not None:
            value, dense = trainer.recovery.best, self.found["dense"]
            record.drop, name = trainer.recovery.behind(value, dense), trainer.recovery.name
            words = f", {name} {shown(name, value)} ({self.difference(record.drop)})"
            if settings.trigger is not False:
                record.fine_tuned = record.drop >= settings.trigger.of(dense, self.trainer.recovery.in_points)
        if record.fine_tuned:
            record.learning_rate = self.rate(phase)
            record.frozen = len(self.found.get("frozen", ()))
        does = f"fine-tuned at {record.learning_rate:.3g}" if record.fine_tuned else "left as it is"
        block = short_paths([other.block for other in trainer.phases])[phase.number - 1]
        tell(trainer, f"block {phase.number}/{len(trainer.phases)} {block}: "
                      f"{trainer.method.words(record.achieved)}{words}; {does}")  # fmt: skip
        return record.fine_tuned

    def difference(self, drop: float) -> str:
        """A drop for a person."""
        return self.trainer.recovery.gained(drop, self.found["dense"])

    def rate(self, phase: Phase) -> float:
        """The learning rate of a phase, by what is left of the model."""
        base = phase.learning_rate if phase.learning_rate is not None else self.trainer.args.learning_rate
        return base if self.now.rate is False else self.now.rate.at(remaining(self.trainer), base)

    @contextmanager
    def fine_tuning(self) -> Iterator[None]:
        """The frozen layers take no gradient within."""
        frozen = set(self.found.get("frozen", ()))
        held = [p for name, p in layer_parameters(self.trainer.model) if name in frozen and p.requires_grad]
        for parameter in held:
            parameter.requires_grad_(False)
            parameter.grad = None
        try:
            yield
        finally:
            for parameter in held:
                parameter.requires_grad_(True)

    def report(self) -> dict[str, Any]:
        """What the run's report says of it."""
        steps = self.trainer.steps
        return {
            "kind": "ice",
            **self.found,
            "settings": self.now.model_dump(mode="json"),
            "fine_tuned": sum(bool(step.fine_tuned) for step in steps),
            "steps": len(steps),
        }


def remaining(trainer: PruningTrainer) -> float:
    """The fraction of the dense model's parameters that is left, and not held at zero."""
    if trainer.pruning.is_structural:
        return trainer.pruner.costs.params() / trainer.pruner.dense.params
    total = sum(parameter.numel() for parameter in trainer.model.parameters())
    return 1 - trainer.masks.zeros / total


class _Norms(TrainerCallback):
    """The L1 norm of every layer's weight when fine-tuning begins."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.before = norms(model)


def norms(model: nn.Module) -> dict[str, float]:
    """Layer name to the L1 norm of its weight."""
    return {name: float(module.weight.detach().double().abs().sum()) for name, module in layers(model)}


def probe(kind: type[PruningTrainer], trainer: PruningTrainer, settings: Ice) -> dict[str, float]:
    """How much fine-tuning changes each layer: `| |W_after|_1 - |W_before|_1 | / |W_dense|_F`.

    A copy of the model loses the units of its first block and is fine-tuned as long as a step is; the model itself is
    not changed.

    Returns:
        Layer name to its change, in the model's order.
    """
    dense = {name: float(module.weight.detach().double().norm()) for name, module in layers(trainer.model)}
    always = settings.model_copy(update={"trigger": False, "freeze": False, "tune": None})
    watch = _Norms()
    side = side_trainer(kind, trainer, always, trainer.train_dataset, None, [watch])
    side.phases = side.phases[:1]
    side.train()
    after = norms(side.model)
    return {name: abs(after[name] - watch.before[name]) / max(dense[name], 1e-12) for name in dense}


def least_changed(changes: dict[str, float], fraction: float) -> list[str]:
    """The `ceil(fraction * layers)` layers that change least, in the model's order; never all of them."""
    count = min(math.ceil(fraction * len(changes)), len(changes) - 1)
    order = sorted(changes, key=lambda name: changes[name])
    chosen = set(order[:count])
    return [name for name in changes if name in chosen]


def layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The linear layers and convolutions, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LAYERS)]


def layer_parameters(model: nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters of every layer, with its name, and those of the batch norm or group norm that follows it."""
    layer = None
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            layer = name
        elif layer is None or not (hasattr(module, "num_features") or hasattr(module, "num_channels")):
            # Anything else with parameters of its own stands between a layer and what follows.
            layer = None if next(module.parameters(recurse=False), None) is not None else layer
            continue
        yield from ((layer, parameter) for parameter in module.parameters(recurse=False))
        layer = name if isinstance(module, LAYERS) else None
