"""compare: methods, schedules, ratios and criteria side by side, over seeds, from one dense model."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import Subset
from transformers import TrainingArguments

from hfprune.analysis.axes import AxesComparison
from hfprune.analysis.comparison import Comparison
from hfprune.analysis.methods import Scale, applicable
from hfprune.analysis.rescored import Rescored
from hfprune.analysis.runs import read_result, run_cell, trainer_of, updates_per_epoch
from hfprune.checkpoint.files import write_text
from hfprune.errors import CheckpointError, ConfigError
from hfprune.folders import claimed, differences
from hfprune.grid import Cell, Grid
from hfprune.hub.card import RECIPE_FILE
from hfprune.methods import Method
from hfprune.pipeline import Job, make_trainer, prepare_run, train_dense
from hfprune.recipe import Recipe, load_yaml
from hfprune.report.tables import is_fraction, percent, title
from hfprune.training.arguments import training_arguments
from hfprune.training.choice import family_of
from hfprune.training.progress import PhaseProgress

MANY = 60
"""Runs above which a grid begins only when it is confirmed."""
_LOOK = 5.0
"""Seconds between looks at runs that other processes hold."""
_TIMED_STEPS, _TIMED_ROWS = 4, 256

Progress = Callable[[str, int, int], None]
"""Told of every optimizer step: what runs, and how many of all are done."""


def compare(
    recipe: Recipe,
    *,
    keep: bool = False,
    yes: bool = False,
    wait: bool = True,
    console: Console | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Runs the grid of a recipe's `compare:` section and says which strategy won.

    All runs begin with the same dense model (`baseline`, trained once into `dense/`, or the model as it is), see the
    data in the same order where their seeds are the same, and have the same budget or the same patience. A run that is
    complete is not made again; one that was interrupted goes on from its last checkpoint. Several processes that are
    given the same recipe share the grid. Where the grid names methods every run's model is also weighed: bytes on disk
    and latency, in turns with the dense model.

    Example:
        >>> found = compare(Recipe.from_yaml("recipes/compare_cifar10.yaml", ["compare.ratios=[.8]"]))
        >>> rich.print(found.table())

    Args:
        recipe: of its `pruning:` the schedule, the target, the criterion and the length of the recovery are replaced,
            and with methods the granularity.
        keep: save the pruned model of every run in `output.folder/runs/`.
        yes: begin also where more than 60 runs are to be made.
        wait: for the runs that other processes hold; else the result is of those that are complete.
        console: where a line a run goes; by default the standard output.
        progress: told of every optimizer step.

    Returns:
        The comparison (an `AxesComparison` of methods); its files are written by its `save`.

    Raises:
        ConfigError: the grid does not fit the recipe, is large and was not confirmed, or the folder holds another one.
        HfpruneError: one line, as where a recipe is run.
    """
    console = console or Console()
    cells, notes = _cells(recipe)
    work = _Work(recipe, cells, console, progress or (lambda *_: None), keep)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("compare: a launcher makes one run of its processes; start the command several times, "
                          "and they share the grid")  # fmt: skip
    work.check_folder()
    if work.left():
        for note in notes:
            console.print(note, highlight=False, soft_wrap=True)
        work.open()
        if len(work.left()) > MANY and not yes:
            fewer = "ratios, seeds or schedules" if work.methods is None else "methods, sizes, seeds or schedules"
            raise ConfigError(f"--yes: {work.estimate()}; confirm with --yes, or take fewer {fewer}")
        work.write_recipe()
        work.make_all(wait)
    results = [result for cell in work.cells if (result := work.result(cell))]
    return (Comparison if work.methods is None else AxesComparison)(results, len(work.cells))


def preview(recipe: Recipe) -> Table:
    """The runs of a recipe's grid, for `rich.print`; nothing is opened or written."""
    cells, notes = _cells(recipe)
    work = _Work(recipe, cells, Console(), lambda *_: None)
    work.check_folder()
    done = sum(work.result(cell) is not None for cell in work.cells)
    seeds = len({cell.seed for cell in work.cells})
    caption = "\n".join(notes) or None
    title = f"{len(work.cells)} runs, {seeds} of each, {done} complete"
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    method = [] if work.methods is None else ["method", "left"]
    for column in (*method, "criterion", "schedule", "targets", "fine-tuning", "complete"):
        table.add_column(column, justify="left")
    rows: dict[tuple[str, ...], int] = {}
    for cell in work.cells:
        targets = [f"{target:.1%}" for target in cell.pruning.targets()]
        shown = ", ".join(targets if len(targets) < 7 else [*targets[:3], "…", *targets[-2:]])
        own = () if cell.method is None else (cell.method.name, f"{cell.size:.4g}")
        row = (*own, cell.criterion_words, cell.schedule, shown, cell.length_words)
        rows[row] = rows.get(row, 0) + (work.result(cell) is not None)
    for row, complete in rows.items():
        table.add_row(*row, f"{complete}/{seeds}")
    return table


def _cells(recipe: Recipe) -> tuple[list[Cell], list[str]]:
    """The runs, and what is left out of the grid and why."""
    seed = recipe.training.get("seed", TrainingArguments.seed)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError(f"training.seed: must be a whole number, not {seed!r}")
    return applicable((recipe.compare or Grid()).cells(recipe.pruning, seed))


@dataclass
class _Work:
    """A grid on its way."""

    recipe: Recipe
    cells: list[Cell]
    console: Console
    tell: Progress
    keep: bool = False
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    job: Job | None = None
    dense: nn.Module | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    scale: Scale | None = None
    rescored: Rescored | None = None

    @property
    def methods(self) -> list[Method] | None:
        """The methods that are compared, if any."""
        return self.recipe.compare.methods if self.recipe.compare is not None else None

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output.folder)

    def place(self, cell: Cell) -> Path:
        return self.folder / "runs" / cell.key

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """A run's result, where it is complete."""
        if cell.key not in self.results and (found := read_result(self.place(cell))) is not None:
            self.results[cell.key] = found
        return self.results.get(cell.key)

    def left(self) -> list[Cell]:
        """The runs that are not complete."""
        return [cell for cell in self.cells if self.result(cell) is None]

    # ---- before ---------------------------------------------------------------------------------------------------

    def check_folder(self) -> None:
        """Refuses a folder whose runs began with another model, data or training."""
        path = self.folder / RECIPE_FILE
        if not path.is_file():
            return
        before = Recipe.parse(load_yaml(path.read_text(encoding="utf-8")))
        for key, old, new in differences(_common(before), _common(self.recipe)):
            raise ConfigError(f"{key}: {new!r} now, but the runs in '{self.folder}' were made with {old!r}; "
                              f"name another output.folder")  # fmt: skip

    def open(self) -> None:
        """Opens model and data, and checks every strategy before anything is trained."""
        pruning = self.cells[0].pruning if self.methods is None else self.recipe.pruning
        nothing = {"push_to_hub": False, "push_every_step": False, "private": False, "revision": None}
        output = self.recipe.output.model_copy(update=nothing)  # a comparison pushes nothing
        recipe = self.recipe.model_copy(update={"pruning": pruning, "output": output})
        self.job = prepare_run(recipe, self.console)
        if self.methods is not None and self.recipe.compare.rescore is not None:
            self.rescored = Rescored(self.recipe, self.job.model, self.job.loaded.processing_class)
        fraction = is_fraction(self.job.metrics.main, [])
        if fraction and (delta := self.recipe.pruning.recovery.min_delta) >= 1:
            raise ConfigError(f"pruning.recovery.min_delta: {delta:g}, but {self.job.metrics.main} lies between 0 and "
                              f"1; {delta:g} points are {delta / 100:g}")  # fmt: skip
        self.updates = updates_per_epoch(self.job)
        hardest: dict[tuple, Cell] = {}  # of each criterion the run in which most goes
        for cell in self.cells:
            self.steps_of(cell)
            key = (cell.method and cell.method.name, cell.criterion_words)
            if cell.ratio > hardest.setdefault(key, cell).ratio:
                hardest[key] = cell
        for cell in hardest.values():
            try:
                with TemporaryDirectory() as folder:
                    trainer_of(self.job, self.job.model, cell, Path(folder), self.updates)
            except ConfigError as error:
                if cell.method is None:
                    raise
                raise ConfigError(f"compare.methods.{cell.method.name} at {cell.size:.4g}: {error}") from error

    def steps_of(self, cell: Cell) -> int:
        """Optimizer steps of a run; with patience the most that it may take."""
        steps = len(cell.pruning.targets())
        if cell.budget is not None:
            return sum(cell.lengths(steps, self.updates))
        recovery, most = cell.pruning.recovery, 0
        for index in range(steps):
            epochs, updates = (recovery.value(name, index) for name in ("epochs", "steps"))
            epochs = self.job.trainer.args.num_train_epochs if epochs is None else epochs
            most += updates if updates is not None else round(epochs * self.updates)
        return most

    def estimate(self) -> str:
        """What is left, and how long that takes by the runs that are done or a few steps timed just now."""
        left = self.left()
        steps = sum(self.steps_of(cell) for cell in left)
        if self.results:
            seconds, source = steps * self.pace(), "by the runs that are done"
        else:
            step, evaluation = self.timed()
            often = sum(2 * len(cell.pruning.targets()) + self.steps_of(cell) // self.updates for cell in left)
            seconds, source = steps * step + often * evaluation, "by a few steps timed just now"
        most = "at most " if left[0].budget is None else ""
        return (
            f"{len(left)} runs of {most}{steps:,} optimizer steps in all would take {most}about {duration(seconds)} in "
            f"one process ({source}; scoring and the dense model apart)"
        )

    def pace(self) -> float:
        """Seconds of an optimizer step, scoring and evaluation included, over the runs that are done."""
        costs = [result["cost"] for result in self.results.values()]
        return sum(cost["seconds"] for cost in costs) / max(1, sum(cost["optimizer_steps"] for cost in costs))

    def timed(self) -> tuple[float, float]:
        """Seconds of an optimizer step and of an evaluation."""
        job = self.job
        brief = {"max_steps": _TIMED_STEPS, "save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no"}
        with TemporaryDirectory() as folder:
            arguments = training_arguments(folder, job.recipe.training | brief, task=job.recipe.data.task)
            loaded = replace(job.loaded, model=copy.deepcopy(job.model))
            trainer = make_trainer(loaded, job.data, job.metrics, arguments)
            trainer.remove_callback(PhaseProgress)
            step = trainer.train().metrics["train_runtime"] / _TIMED_STEPS
            rows = min(_TIMED_ROWS, len(job.data.evaluation))
            spent = trainer.evaluate(Subset(job.data.evaluation, range(rows)))["eval_runtime"]
        return step, spent * len(job.data.evaluation) / rows

    def write_recipe(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / RECIPE_FILE, self.recipe.to_yaml())
        except OSError as error:
            raise CheckpointError(f"output.folder: can't write to '{self.folder}': {error.strerror}") from error

    # ---- the runs ---------------------------------------------------------------------------------------------------

    def make_all(self, wait: bool) -> None:
        """Makes the runs that nobody holds, one after another, and waits for the others."""
        with claimed(self.folder / ".locks" / "dense", wait=True):
            metric = train_dense(self.job, resume=True)
        model = self.job.trainer.accelerator.unwrap_model(self.job.model, keep_fp32_wrapper=False)
        self.dense = copy.deepcopy(model).cpu()
        self.facts = {
            "main_metric": self.job.metrics.main,
            "greater_is_better": self.job.metrics.greater_is_better,
            "dense": metric[self.job.metrics.main],
            "family": family_of(self.dense),
            "measured": self.job.trainer.method.measured,
            "removal": self.recipe.pruning.is_structural,
        }
        if self.methods is not None:
            self.scale = Scale(self.dense, self.job.example(), self.recipe.output.batch_sizes, self.folder)
        if self.rescored is not None:
            self.facts["dense_rescoring"] = self.rescored.measure(self.dense)
        words = f"dense: {self.shown(self.facts['dense'])}{_word_errors(self.facts.get('dense_rescoring'))}; "
        words += f"{len(self.left())} of {len(self.cells)} runs to make"
        self.console.print(words, highlight=False)
        while left := self.left():
            if not any([self.try_one(cell) for cell in left]):
                if not wait:
                    return
                time.sleep(_LOOK)

    def try_one(self, cell: Cell) -> bool:
        """Makes a run, unless another process holds it or it is complete by now; whether it was made here."""
        with claimed(self.folder / ".locks" / cell.key) as mine:
            if not mine or self.result(cell) is not None:
                return False
            total = sum(self.steps_of(each) for each in self.cells)
            before = total - sum(self.steps_of(each) for each in self.left())
            trainer = trainer_of(self.job, self.dense, cell, self.place(cell), self.updates)
            tell = lambda step: self.tell(cell.words, before + step, total)  # noqa: E731
            where = self.place(cell)
            self.results[cell.key] = run_cell(
                trainer, cell, where, self.facts, self.keep, tell, self.scale, self.rescored
            )
        self.line(cell, self.results[cell.key])
        return True

    def line(self, cell: Cell, result: dict[str, Any]) -> None:
        """One line on a run that has ended."""
        left, cost = self.left(), result["cost"]
        value = f"failed: {result['failed']}" if result["failed"] else self.shown(result["value"])
        value += _word_errors(result.get("rescoring"))
        rest = ""
        if left:
            rest = f"; about {duration(self.pace() * sum(self.steps_of(cell) for cell in left))} left"
        self.console.print(
            f"{len(self.cells) - len(left)}/{len(self.cells)}  {cell.words}: "
            f"{value}, {cost['optimizer_steps']} optimizer steps, {cost['seconds']:.0f} s{rest}",
            highlight=False,
            soft_wrap=True,
        )

    def shown(self, value: float) -> str:
        """The metric with its name."""
        name = self.facts["main_metric"]
        return f"{title(name)} {percent(value) if is_fraction(name, [value]) else f'{value:.4g}'}"


def _word_errors(rescoring: dict[str, Any] | None) -> str:
    return "" if rescoring is None else f", WER {percent(rescoring['wer'])}"


def duration(seconds: float) -> str:
    """Such as '45 s', '12 min' or '3 h 05 min'."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def _common(recipe: Recipe) -> dict[str, Any]:
    """What all runs of a grid share."""
    values = recipe.model_dump(mode="json", exclude={"compare", "output"})
    rescore = recipe.compare.rescore if recipe.compare is not None else None
    values["compare"] = {"rescore": None if rescore is None else rescore.model_dump(mode="json")}
    for key in ("schedule", "target", "criterion", "granularity"):
        values["pruning"].pop(key)
    for key in ("epochs", "steps", "patience"):
        values["pruning"]["recovery"].pop(key)
    return values
