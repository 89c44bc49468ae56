"""run(recipe): the whole way from a recipe to a measured, documented checkpoint that loads again."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, set_seed

from hfprune.checkpoint.files import side_folder, write_text
from hfprune.checkpoint.load import from_pretrained
from hfprune.checkpoint.metadata import block_of, is_timm
from hfprune.checkpoint.save import save_pretrained
from hfprune.checkpoint.verify import verify
from hfprune.data import PreparedData, open_data, prepare
from hfprune.errors import CheckpointError, ConfigError, HfpruneError
from hfprune.hub.card import write_card
from hfprune.metrics import Metrics, metrics, metrics_for
from hfprune.models import LoadedModel, load_model
from hfprune.profiling import Measurement, measure
from hfprune.pruner import Pruner
from hfprune.recipe import Recipe, load_yaml
from hfprune.registry import did_you_mean
from hfprune.report.environment import environment
from hfprune.report.plots import sparsity_plot, trajectory_plot
from hfprune.report.tables import comparison_table, steps_table
from hfprune.training.arguments import training_arguments
from hfprune.training.phases import numbers
from hfprune.training.resume import last_checkpoint
from hfprune.training.trainer import PruningTrainer

RECIPE_FILE = "recipe.yaml"
REPORT_FILE = "pruning_report.json"
DENSE_FOLDER = "dense"
DENSE_FILE = "dense.json"
"""Written last into the dense folder: it says that the dense model is complete, and how good it is."""


@dataclass
class _Job:
    """Everything that a recipe names, opened and checked."""

    recipe: Recipe
    folder: Path
    model: nn.Module
    loaded: LoadedModel
    data: PreparedData
    metrics: Metrics
    trainer: PruningTrainer
    console: Console


def run(recipe: Recipe, *, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Trains the baseline, prunes, recovers, measures, and writes the folder that `output.folder` names.

    Args:
        recipe: the whole run.
        resume: go on after an interruption; the result is that of an uninterrupted run. A run that has ended is only
            shown again. Without it an earlier run in the folder is moved into `previous/`.
        console: where tables and messages go; by default the standard output.

    Returns:
        The report, as it stands in `pruning_report.json`.

    Raises:
        HfpruneError: one line that names what is wrong; before any weight is changed wherever it can be known then.
    """
    console = console or Console()
    folder = Path(recipe.output.folder)
    # config.json is the last file that the end of a run moves into place.
    if resume and all((folder / name).is_file() for name in (REPORT_FILE, RECIPE_FILE, "config.json")):
        report = _ended_run(recipe, folder)
        _show(report, console, folder, ended=True)
        return report
    job = prepare_run(recipe, console)
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            _clear_way(folder, recipe, resume, console)
    began = time.perf_counter()
    dense_metric = _train_dense(job, resume)
    dense = copy.deepcopy(job.model).cpu()
    last = last_checkpoint(folder) if resume else None
    if last is not None and PartialState().is_main_process:
        console.print(f"resuming from {last}", highlight=False)
    job.trainer.train(resume_from_checkpoint=str(last) if last else None)
    pruned_metric = numbers(job.trainer.evaluate())
    if PartialState().is_main_process:
        # One process measures while the others rest.
        report = _report(job, dense, dense_metric, pruned_metric, time.perf_counter() - began)
        _write(job, report)
        _show(report, console, folder)
    PartialState().wait_for_everyone()
    return json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))


def prepare_run(recipe: Recipe, console: Console | None = None) -> _Job:
    """Opens the data and the model and checks that all parts of the recipe fit; nothing is trained or written."""
    folder = Path(recipe.output.folder)
    if folder.is_file():
        raise ConfigError(f"output.folder: '{folder}' is a file; name a folder")
    arguments = training_arguments(recipe.output.folder, recipe.training)
    if recipe.baseline is not None:
        training_arguments(recipe.output.folder, recipe.training, recipe.baseline)
    metrics = metrics_for(recipe.data.metrics, recipe.data.task)
    if arguments.metric_for_best_model is None:
        arguments.metric_for_best_model = metrics.main
        arguments.greater_is_better = metrics.greater_is_better
    raw = open_data(recipe.data, arguments.seed)
    set_seed(arguments.seed)
    loaded = load_model(recipe.model, recipe.data.task, raw.labels)
    data = prepare(raw, loaded.model, loaded.processing_class, arguments.seed)
    with _nothing_made(folder):
        trainer = _trainer(PruningTrainer, loaded, data, metrics, arguments, recipe)
        trainer.create_optimizer()
        trainer.optimizer = None
        _check_watched(recipe, metrics)
    return _Job(recipe, folder, loaded.model, loaded, data, metrics, trainer, console or Console())


def _check_watched(recipe: Recipe, measured: Metrics) -> None:
    """Refuses to watch a metric that is not among those measured, where all of these are known by name."""
    names = recipe.data.metrics or [measured.main]
    if not all(name in metrics for name in names):
        return
    watched = {
        "pruning.recovery.monitor": recipe.pruning.recovery.monitor,
        "training.metric_for_best_model": recipe.training.get("metric_for_best_model"),
    }
    for key, name in watched.items():
        short = (name or "loss").removeprefix("eval_")
        if short not in {*names, "loss"}:
            raise ConfigError(f"{key}: '{short}' is not measured; {did_you_mean(short, [*names, 'loss'])}")


@contextmanager
def _nothing_made(folder: Path) -> Iterator[None]:
    """Takes away the empty folder that Trainer makes at once."""
    existed = folder.exists()
    try:
        yield
    except HfpruneError:
        raise
    except OSError as error:
        raise CheckpointError(f"output.folder: can't write to '{folder}': {error.strerror or error}") from error
    except (ValueError, TypeError, ImportError, RuntimeError, AttributeError) as error:
        raise ConfigError(f"training: {' '.join(str(error).split())[:300]}") from error
    finally:
        if not existed:
            with suppress(OSError):
                folder.rmdir()


def _trainer(
    kind: type[PruningTrainer], loaded: LoadedModel, data: PreparedData, metrics: Metrics, arguments: Any, recipe: Any
) -> PruningTrainer:
    return kind(
        model=loaded.model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        data_collator=data.collator,
        processing_class=loaded.processing_class,
        compute_metrics=metrics.compute,
        preprocess_logits_for_metrics=metrics.preprocess_logits,
        pruning=recipe.pruning if recipe is not None else None,
        base_model=loaded.base_model,
    )


# ---- the folder, before --------------------------------------------------------------------------------------------


def _ended_run(recipe: Recipe, folder: Path) -> dict[str, Any]:
    _check_same_recipe(recipe, folder)
    return json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))


def _check_same_recipe(recipe: Recipe, folder: Path) -> None:
    """Refuses to go on with a run that another recipe began, naming the first key that differs."""
    path = folder / RECIPE_FILE
    if not path.is_file():
        return
    before = Recipe.parse(load_yaml(path.read_text(encoding="utf-8"))).model_dump(mode="json")
    now = recipe.model_dump(mode="json")
    for key, old, new in _differences(before, now):
        if not key.startswith("output."):
            raise ConfigError(
                f"{key}: {new!r} now, but the run in '{folder}' was begun with {old!r}; "
                f"resume with the same recipe, or leave out --resume to begin anew"
            )


def _differences(before: Any, now: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for part in [*before, *(k for k in now if k not in before)]:
            found += _differences(before.get(part), now.get(part), f"{key}.{part}" if key else part)
        return found
    return [] if before == now else [(key, before, now)]


def _clear_way(folder: Path, recipe: Recipe, resume: bool, console: Console) -> None:
    """Checks a run to go on with, or moves an earlier one aside; then leaves the recipe in the folder."""
    if resume:
        _check_same_recipe(recipe, folder)
    elif folder.is_dir() and any(folder.glob("checkpoint-*")) | (folder / RECIPE_FILE).is_file():
        aside = _move_aside(folder)
        console.print(f"an earlier run in {folder} was moved to {aside}", highlight=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / RECIPE_FILE, recipe.to_yaml())
    except OSError as error:
        raise CheckpointError(f"output.folder: can't write to '{folder}': {error.strerror}") from error


def _move_aside(folder: Path) -> Path:
    previous = folder / "previous"
    number = 1 + max((int(p.name) for p in previous.glob("*") if p.name.isdigit()), default=0)
    aside = previous / str(number)
    aside.mkdir(parents=True)
    # The report goes first: what is left when this is interrupted does not look like a run that has ended.
    for path in sorted(folder.iterdir(), key=lambda p: p.name != REPORT_FILE):
        if path.name != "previous":
            shutil.move(path, aside / path.name)
    return aside


# ---- dense ---------------------------------------------------------------------------------------------------------


def _train_dense(job: _Job, resume: bool) -> dict[str, float]:
    """The dense model's metrics, after training it where the recipe has a baseline; a finished one is taken up."""
    folder = job.folder / DENSE_FOLDER
    if job.recipe.baseline is None:
        return numbers(job.trainer.evaluate())
    if resume and (folder / DENSE_FILE).is_file():
        state = from_pretrained(folder, job.model if _is_own(job.model) else None).state_dict()
        job.model.load_state_dict(state)
        return json.loads((folder / DENSE_FILE).read_text(encoding="utf-8"))["metric"]
    arguments = training_arguments(str(folder), job.recipe.training, job.recipe.baseline)
    trainer = _trainer(PruningTrainer, job.loaded, job.data, job.metrics, arguments, None)
    last = last_checkpoint(folder) if resume else None
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    metric = numbers(trainer.evaluate())
    if PartialState().is_main_process:
        save_pretrained(job.model, folder, processing_class=job.loaded.processing_class)
        write_text(
            folder / DENSE_FILE,
            json.dumps({"metric": metric, "optimizer_steps": trainer.state.global_step}, indent=2) + "\n",
        )
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)
    return metric


def _is_own(model: nn.Module) -> bool:
    return not isinstance(model, PreTrainedModel) and not is_timm(model)


# ---- the result ----------------------------------------------------------------------------------------------------


def _report(
    job: _Job, dense: nn.Module, dense_metric: dict[str, float], pruned_metric: dict[str, float], seconds: float
) -> dict[str, Any]:
    trainer, model = job.trainer, job.model
    before, after = _measure_both(job, dense.to(next(model.parameters()).device), model)
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    return {
        "dense": {"metric": dense_metric, **before.to_dict()},
        "pruned": {"metric": pruned_metric, **after.to_dict()},
        "steps": [step.to_dict() for step in trainer.steps],
        "sparsity": block_of(model)["sparsity"],
        "recipe": job.recipe.model_dump(mode="json"),
        "main_metric": job.metrics.main,
        "greater_is_better": job.metrics.greater_is_better,
        "base_model": job.loaded.base_model,
        "seconds": round(seconds, 3),
        "seed": trainer.args.seed,
        "environment": environment(device, dtype),
    }


def _measure_both(job: _Job, dense: nn.Module, pruned: nn.Module) -> tuple[Measurement, Measurement]:
    """Dense and pruned in turns, so that what else the machine does falls on both; the quicker of two turns counts."""
    example = job.data.example(1)
    example = tuple(example.values()) if job.trainer.plain_module else example
    sizes = tuple(job.recipe.output.batch_sizes)
    rounds = [(measure(dense, example, sizes), measure(pruned, example, sizes)) for _ in range(2)]
    return tuple(min(turns, key=lambda m: sum(m.latency_ms.values())) for turns in zip(*rounds, strict=True))


def _write(job: _Job, report: dict[str, Any]) -> None:
    """Writes the whole result to the side, proves that it loads again, and moves it into place."""
    with side_folder(job.folder) as side:
        save_pretrained(job.model, side, job.trainer.masks, job.loaded.processing_class)
        _prove(job.model, side)
        write_text(side / RECIPE_FILE, job.recipe.to_yaml())
        write_text(side / REPORT_FILE, json.dumps(report, indent=2) + "\n")
        sparsity_plot(report, side / "sparsity.png")
        trajectory_plot(report, side / "trajectory.png")
        write_card(
            side,
            report,
            name=job.folder.resolve().name,
            recipe_yaml=job.recipe.to_yaml(),
            kind=_kind(job.model),
            loading=_loading(job.model, job.folder),
        )


def _prove(model: nn.Module, folder: Path) -> None:
    """Loads the saved model and compares every tensor, bit for bit."""
    verify(folder).raise_if_bad(folder)
    loaded = from_pretrained(folder, copy.deepcopy(model).cpu() if _is_own(model) else None, check=False).state_dict()
    for name, value in model.state_dict().items():
        if name not in loaded or not torch.equal(loaded[name].cpu(), value.cpu()):
            raise CheckpointError(f"'{name}' does not load again as it was saved; nothing was written")


def _kind(model: nn.Module) -> str:
    if is_timm(model) or type(model).__name__.startswith("TimmWrapper"):
        return "timm"
    return "transformers" if isinstance(model, PreTrainedModel) else "module"


def _loading(model: nn.Module, folder: Path) -> str:
    """The lines that load this checkpoint."""
    path = folder.name
    if not isinstance(model, PreTrainedModel):
        kind = type(model)
        return (
            f"import hfprune\nfrom {kind.__module__} import {kind.__qualname__}\n\n"
            f'model = hfprune.from_pretrained("{path}", model={kind.__qualname__})'
        )
    name = type(model).__name__
    for task in ("ImageClassification", "SequenceClassification", "CausalLM"):
        if name.endswith(f"For{task}"):
            name = f"AutoModelFor{task}"
    lines = f'from transformers import {name}\n\nmodel = {name}.from_pretrained("{path}")'
    if _kind(model) == "timm":
        lines += (
            f'\n\n# or with timm alone\nimport timm\n\nmodel = timm.create_model("local-dir:{path}", pretrained=True)'
        )
    return lines


def _show(report: dict[str, Any], console: Console, folder: Path, ended: bool = False) -> None:
    if ended:
        console.print(f"the run in {folder} has ended already; this is its result", highlight=False)
    if report["steps"]:
        console.print(steps_table(report))
    console.print(comparison_table(report))
    console.print(f"\nsaved to {folder}: model, card (README.md), {REPORT_FILE}, pictures, recipe", highlight=False)


def plan_table(job: _Job) -> Any:
    """What a recipe would do: one row a pruning step, with the units that go."""
    from rich.table import Table

    pruner: Pruner = job.trainer.pruner
    table = Table(title=f"{len(pruner.weights)} weights, {pruner.total_units:,} units", title_justify="left")
    for column in ("step", "target", "units gone", "recovery"):
        table.add_column(column, justify="left" if column == "recovery" else "right")
    recovery = job.recipe.pruning.recovery
    for index, target in enumerate(job.recipe.pruning.targets()):
        said = {name: recovery.value(name, index) for name in ("epochs", "steps", "patience", "learning_rate")}
        words = ", ".join(f"{name} {value:g}" for name, value in said.items() if value is not None)
        gone = pruner.wanted(target)
        table.add_row(str(index + 1), f"{target:.2%}", f"{gone:,}", words or "as training says")
    return table
