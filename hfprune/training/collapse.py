"""Collapse: a step that ends too far behind the dense model; the schedule stops, goes back, or halves the step."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from hfprune.checkpoint.files import write_text
from hfprune.checkpoint.save import unshared
from hfprune.errors import Collapsed, ConfigError
from hfprune.masks import MaskSet
from hfprune.training.ice.blockwise import method_of
from hfprune.training.phases import PruningState, phases_of
from hfprune.training.progress import shown, tell

if TYPE_CHECKING:
    from hfprune.training.trainer import PruningTrainer

HELD_WEIGHTS, HELD_MASKS, HELD_FILE = "pruning_held.safetensors", "pruning_held_masks.safetensors", "pruning_held.json"
SMALLEST = 8
"""Into how many parts a step of the schedule is divided at most."""


class Guard:
    """Watches the metric at the end of every step, and remembers the last step that held.

    It keeps a copy of the weights in main memory, in every checkpoint too, and for removals one of the dense model.

    Args:
        trainer: with its recovery and method.

    Raises:
        ConfigError: nothing measures the metric, the drop's unit is not that of the metric, or the way back can't be
            gone with what the trainer was given.
    """

    def __init__(self, trainer: PruningTrainer):
        self.trainer, self.settings = trainer, trainer.pruning.recovery
        self.held: dict[str, Any] | None = None
        config, key = trainer.pruning, "pruning.recovery"
        if trainer.recovery is None:
            raise ConfigError(f"{key}.max_drop: needs an eval_dataset to measure the metric on; or leave it out")
        self.watched = trainer.recovery
        self.watched.check_unit(f"{key}.max_drop", self.settings.max_drop)
        fixed = {"a strategy": config.strategy, "export_sizes": config.export_sizes, "every": config.schedule.every}
        if self.settings.on_collapse == "halve_step" and (named := [name for name in fixed if fixed[name]]):
            raise ConfigError(f"{key}.on_collapse: halve_step changes the schedule's targets, which {named[0]} sets; "
                              f"use rollback or stop")  # fmt: skip
        if config.is_structural and trainer.optimizer is not None:
            raise ConfigError(f"{key}.max_drop: what was removed can't be given back to an optimizer of your own; "
                              f"name one in the training arguments")  # fmt: skip
        self.dense = copy.deepcopy(trainer.model).cpu() if config.is_structural else None

    def begin(self, ignore_keys: list[str] | None) -> None:
        """Measures the dense model, the first that holds."""
        trainer = self.trainer
        trainer.progress.dense = self.watched.value_of(trainer.evaluate(ignore_keys=ignore_keys))
        trainer.unwrap()
        self.hold()

    def hold(self) -> None:
        """Remembers the model as it is."""
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        self.held = {
            "weights": {k: v.detach().to("cpu", copy=True) for k, v in model.state_dict().items()},
            "masks": {name: bits.clone() for name, bits in trainer.masks.state_dict().items()},
            "pattern": trainer.masks.pattern,
            "structure": trainer.method.state(),
            "progress": copy.deepcopy(trainer.progress.to_dict()),
        }

    def check(self) -> bool:
        """Looks at the step that has just ended, and goes the way that the recipe says where it did not hold.

        Returns:
            Whether the model is still that of the step.

        Raises:
            Collapsed: no step held; the model is dense again.
        """
        trainer, record, watched = self.trainer, self.trainer.progress.record, self.watched
        value, dense = record.metric[watched.name], trainer.progress.dense
        drop, most = watched.behind(value, dense), self.settings.max_drop.of(dense, watched.in_points)
        if drop <= most:  # not so for what is no number
            self.hold()
            return True
        words = (
            f"{trainer.method.words(record.achieved)}: {watched.name} {shown(watched.name, value)} is "
            f"{watched.gained(drop, dense).lstrip('+-')} behind the dense model's, more than {self.settings.max_drop}"
        )
        collapse = record.to_dict() | {"drop": None if math.isnan(drop) else drop}
        if self.settings.on_collapse == "stop":
            self._end(words, collapse, f"{words}; the schedule stopped here")
            return True
        between = self._between(record.target) if self.settings.on_collapse == "halve_step" else None
        self.roll_back()
        if between is not None:
            self._note(collapse, f"halved to {between:.4g}")
            number = trainer.progress.phase + 1
            targets = [phase.target for phase in trainer.phases]
            trainer.progress.targets = [*targets[:number], between, *targets[number:]]
            trainer.phases = phases_of(trainer.pruning, trainer.progress.targets)
            tell(trainer, f"{words}; back to the step before, and from there half as far")
        elif trainer.steps:
            back = f"the schedule ended with the step before: {words}"
            self._end(f"{words}; back to the step before, where the schedule ends", collapse, back)
        else:
            raise Collapsed(f"pruning.recovery.max_drop: {words}, and no step before it held: the model is dense "
                            f"again; prune less at once, fine-tune longer, or say on_collapse: halve_step")  # fmt: skip
        return False

    def _between(self, target: float) -> float | None:
        """Half the way from what holds to a target; None where that is too little to be a step."""
        held = self.held["progress"]["record"]
        begin = held["target"] if held else 0.0
        schedule = [0.0, *self.trainer.method.targets()]
        of_schedule = next(i for i, value in enumerate(schedule) if value >= target - 1e-12)
        step = schedule[of_schedule] - schedule[max(0, of_schedule - 1)]
        half = (target - begin) / 2
        return begin + half if half >= step / SMALLEST * (1 - 1e-9) else None

    def _end(self, words: str, collapse: dict[str, Any], note: str) -> None:
        progress = self.trainer.progress
        self._note(collapse, self.settings.on_collapse)
        progress.ended = True
        progress.record.note = progress.records[-1].note = note
        tell(self.trainer, words)

    def _note(self, collapse: dict[str, Any], followed: str) -> None:
        self.trainer.progress.collapses.append(collapse | {"followed": followed})

    def roll_back(self) -> None:
        """Makes the model what it was at the end of the last step that held; steps and epochs count on."""
        trainer, held = self.trainer, self.held
        trainer.unwrap()
        model, now = trainer.model, trainer.progress
        trainer.progress = PruningState.from_dict(copy.deepcopy(held["progress"]))
        progress = trainer.progress
        progress.collapses, progress.targets, progress.seconds = now.collapses, now.targets, now.seconds
        progress.step_offset, progress.epoch_offset, progress.scored = now.step_offset, now.epoch_offset, now.scored
        if progress.record is None:
            progress.phase, progress.done = -1, True
        if self.dense is not None:
            fresh = vars(copy.deepcopy(self.dense).to(trainer.args.device))
            vars(model).clear()
            vars(model).update(fresh)
            trainer.masks = MaskSet({})
            trainer.method = method_of(trainer)
            trainer.method.load(held["structure"])
        model.load_state_dict(held["weights"])
        trainer.masks = MaskSet.from_state_dict(held["masks"], model, held["pattern"]).bind(model)
        trainer.history = {}
        trainer.method.annotate(trainer.achieved)

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Writes what holds into a checkpoint."""
        save_file(unshared(self.held["weights"]), folder / HELD_WEIGHTS)
        if self.held["masks"]:
            save_file(self.held["masks"], folder / HELD_MASKS)
        plain = {key: self.held[key] for key in ("pattern", "structure", "progress")}
        write_text(folder / HELD_FILE, json.dumps(plain) + "\n")

    def load(self, folder: Path) -> None:
        """Takes up what `save` wrote."""
        masks: dict[str, torch.Tensor] = load_file(folder / HELD_MASKS) if (folder / HELD_MASKS).is_file() else {}
        self.held = {
            **json.loads((folder / HELD_FILE).read_text(encoding="utf-8")),
            "weights": load_file(folder / HELD_WEIGHTS),
            "masks": masks,
        }
