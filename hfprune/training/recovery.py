"""Recovery: when a phase ends, and on which weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from hfprune.config import Recovery, shrinks
from hfprune.drop import Drop
from hfprune.errors import ConfigError
from hfprune.registry import did_you_mean
from hfprune.report.tables import is_fraction
from hfprune.sharding import is_sharded, local, put_back


class RecoveryCallback(TrainerCallback):
    """Watches one metric through a phase, keeps the best weights, and ends the phase when patience runs out.

    The best starts from the value right after pruning: a phase never ends worse than it began.

    Args:
        settings: the recipe's recovery section.
        monitor: the metric's name as `evaluate()` gives it, `eval_` included.
        greater_is_better: whether it is to grow.
    """

    def __init__(self, settings: Recovery, monitor: str, greater_is_better: bool):
        self.settings = settings
        self.monitor = monitor
        self.greater_is_better = greater_is_better
        self.begin(None)

    def begin(self, patience: int | None) -> None:
        """A new phase: nothing seen yet."""
        self.patience = patience
        self.active = True
        self.best: float | None = None
        self.metrics: dict[str, float] | None = None
        self.best_step: int | None = None
        self.weights: dict[str, torch.Tensor] | None = None
        self.reference: float | None = None
        self.waited = 0

    def value_of(self, metrics: dict[str, float]) -> float:
        """The monitored value; a ConfigError that names the nearest when it was not measured."""
        if self.monitor not in metrics:
            names = [name.removeprefix("eval_") for name in metrics if isinstance(metrics[name], int | float)]
            nearest = did_you_mean(self.name, names)
            raise ConfigError(f"pruning.recovery.monitor: '{self.name}' is not measured; {nearest}")
        return float(metrics[self.monitor])

    def observe(self, metrics: dict[str, float], model: nn.Module, step: int) -> None:
        """Takes in an evaluation of the weights at an optimizer step."""
        value = self.value_of(metrics)
        if math.isnan(value):
            self.waited += 1
            return
        if self.best is None or self._better(value, self.best, 0.0):
            self.best, self.metrics, self.best_step = value, dict(metrics), step
            if self.settings.restore_best:
                # Cloned: a state dict kept by reference would follow the weights that go on training.
                self.weights = {k: local(v).detach().to("cpu", copy=True) for k, v in model.state_dict().items()}
        if self.reference is None or self._better(value, self.reference, self.settings.min_delta):
            self.reference, self.waited = value, 0
        else:
            self.waited += 1

    @property
    def name(self) -> str:
        """The metric watched, without `eval_`."""
        return self.monitor.removeprefix("eval_")

    @property
    def in_points(self) -> bool:
        """Whether percentage points can be said of it."""
        return is_fraction(self.monitor, ())

    def check_unit(self, key: str, drop: Drop) -> None:
        """Refuses a drop in points of a metric that has none; `key` is where the drop is said."""
        if drop.points is not None and not self.in_points:
            raise ConfigError(
                f"{key}: '{self.name}' is watched, which has no percentage points; set pruning.recovery.monitor to an "
                f"accuracy, or give a fraction of the dense value, e.g. {key.rpartition('.')[2]}: {{relative: 0.05}}"
            )

    def behind(self, value: float, dense: float) -> float:
        """How much worse a value is than the dense model's; below 0 where it is better."""
        return dense - value if self.greater_is_better else value - dense

    def gained(self, drop: float, dense: float) -> str:
        """A drop for a person, as what is won or lost against the dense model."""
        if self.in_points:
            return f"{-drop * (1 if abs(dense) > 1 else 100) + 0.0:+.2f} points"
        return f"{drop if not self.greater_is_better else -drop:+.4g}"

    @property
    def exhausted(self) -> bool:
        """Whether the metric has not improved for as long as patience goes."""
        return self.patience is not None and self.waited >= self.patience

    def _better(self, value: float, than: float, by: float) -> bool:
        return value > than + by if self.greater_is_better else value < than - by

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], model: Any, **_: Any) -> None:
        # One of several evaluation sets may not measure what is watched.
        if not (self.active and self._in_phase and self.monitor in metrics):
            return
        self.observe(metrics, model, state.global_step)
        if self.exhausted:
            control.should_training_stop = True

    _in_phase = False

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._in_phase = True

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._in_phase = False

    def restore(self, model: nn.Module, step: int) -> bool:
        """Puts the best weights back; whether that changed anything. `step` is where the model stands now."""
        if self.weights is None or self.best_step == step:
            return False
        if any(is_sharded(parameter) for parameter in model.parameters()):
            put_back(model, self.weights)
        else:
            model.load_state_dict(self.weights)
        return True

    def state(self) -> dict[str, Any]:
        """Plain values that `load` takes back; the weights are saved apart."""
        return {
            "best": self.best,
            "metrics": self.metrics,
            "best_step": self.best_step,
            "reference": self.reference,
            "waited": self.waited,
            "active": self.active,
        }

    def load(self, state: dict[str, Any], weights: dict[str, torch.Tensor] | None, patience: int | None) -> None:
        """Goes on from a saved state."""
        self.begin(patience)
        for key, value in state.items():
            setattr(self, key, value)
        self.weights = weights


def monitored(settings: Recovery, args: TrainingArguments, eval_dataset: Any) -> tuple[str, bool]:
    """The metric to watch, `eval_` included, and whether it is to grow.

    Raises:
        ConfigError: there are several evaluation sets, and the metric is of none of them.
    """
    said = settings.monitor or args.metric_for_best_model
    name = (said or "loss").removeprefix("eval_")
    if isinstance(eval_dataset, dict) and not name.startswith(tuple(f"{part}_" for part in eval_dataset)):
        parts = list(eval_dataset)
        if said or len(parts) != 1:
            raise ConfigError(
                f"pruning.recovery.monitor: '{name}' is measured on each of {', '.join(parts)}; name the one to watch, "
                f"e.g. {parts[0]}_{name}"
            )
        name = f"{parts[0]}_{name}"
    greater = settings.greater_is_better
    if greater is None:
        greater = not shrinks(name)
        # TrainingArguments fill in True for every name that does not end in "loss": only False is somebody's word.
        if said == args.metric_for_best_model and args.greater_is_better is False:
            greater = False
    return f"eval_{name}", greater
