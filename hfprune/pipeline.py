"""run(recipe): the whole way from a recipe to a measured, documented checkpoint that loads again."""

from __future__ import annotations

import copy
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, TrainingArguments, set_seed

from hfprune.checkpoint.files import side_folder, write_text
from hfprune.checkpoint.load import from_pretrained
from hfprune.checkpoint.metadata import block_of, is_timm
from hfprune.checkpoint.save import save_pretrained
from hfprune.checkpoint.verify import verify
from hfprune.config import PruningConfig
from hfprune.data import PreparedData, open_data, prepare
from hfprune.errors import CheckpointError, ConfigError
from hfprune.hub.card import write_card
from hfprune.metrics import Metrics, metrics_for
from hfprune.models import LoadedModel, load_model
from hfprune.profiling import Measurement, example_batch, measure
from hfprune.recipe import Recipe, load_yaml
from hfprune.report.environment import environment
from hfprune.report.plots import sparsity_plot, trajectory_plot, units_plot
from hfprune.report.tables import comparison_table, removed_table, sizes_table, steps_table
from hfprune.structure.graph import main_outputs
from hfprune.training.arguments import recipe_keys, training_arguments
from hfprune.training.family import measured_sizes
from hfprune.training.phases import numbers
from hfprune.training.rehearsal import check_watched, nothing_made, rehearse
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

    def example(self) -> Any:
        """One row of the evaluation data as the model takes it."""
        inputs = self.data.example(1)
        return tuple(inputs.values()) if self.trainer.plain_module else inputs


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
        # The arguments say on what to run, and with that which of several processes this one is.
        if training_arguments(recipe.output.folder, recipe.training).process_index == 0:
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
        _write(job, report, dense)
        _show(report, console, folder)
    PartialState().wait_for_everyone()
    return json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))


def prepare_run(recipe: Recipe, console: Console | None = None) -> _Job:
    """Opens the data and the model and checks that all parts of the recipe fit; nothing is trained or written."""
    folder = Path(recipe.output.folder)
    if folder.is_file():
        raise ConfigError(f"output.folder: '{folder}' is a file; name a folder")
    metrics = metrics_for(recipe.data.metrics, recipe.data.task)
    arguments = _arguments(recipe, metrics)
    if recipe.baseline is not None:
        _dense_arguments(recipe, metrics)
    raw = open_data(recipe.data, arguments.seed)
    set_seed(arguments.seed)
    loaded = load_model(recipe.model, recipe.data.task, raw.labels)
    data = prepare(raw, loaded.model, loaded.processing_class, arguments.seed)
    check_watched(recipe, metrics)
    # Arguments are made right before their trainer: accelerate knows one precision at a time.
    if recipe.baseline is not None:
        keys = recipe_keys(recipe.training, recipe.baseline)
        with nothing_made(folder / DENSE_FOLDER, keys):
            rehearse(_trainer(loaded, data, metrics, _dense_arguments(recipe, metrics)), keys)
    keys = recipe_keys(recipe.training)
    with nothing_made(folder / DENSE_FOLDER, keys):
        trainer = _trainer(loaded, data, metrics, _arguments(recipe, metrics), recipe.pruning)
        rehearse(trainer, keys)
    return _Job(recipe, folder, loaded.model, loaded, data, metrics, trainer, console or Console())


def _arguments(recipe: Recipe, measured: Metrics) -> TrainingArguments:
    watched = {"metric": measured.main, "greater_is_better": measured.greater_is_better}
    return training_arguments(recipe.output.folder, recipe.training, **watched)


def _dense_arguments(recipe: Recipe, measured: Metrics) -> TrainingArguments:
    watched = {"metric": measured.main, "greater_is_better": measured.greater_is_better}
    folder = str(Path(recipe.output.folder) / DENSE_FOLDER)
    return training_arguments(folder, recipe.training, recipe.baseline, **watched)


def _trainer(
    loaded: LoadedModel,
    data: PreparedData,
    metrics: Metrics,
    arguments: TrainingArguments,
    pruning: PruningConfig | None = None,
) -> PruningTrainer:
    return PruningTrainer(
        model=loaded.model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        data_collator=data.collator,
        processing_class=loaded.processing_class,
        compute_metrics=metrics.compute,
        preprocess_logits_for_metrics=metrics.preprocess_logits,
        pruning=pruning,
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
    trainer = _trainer(job.loaded, job.data, job.metrics, _dense_arguments(job.recipe, job.metrics))
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
        **trainer.method.report(),
        **_sizes(job, dense, dense_metric),
        **_conditions(job),
        "recipe": job.recipe.model_dump(mode="json"),
        "main_metric": job.metrics.main,
        "greater_is_better": job.metrics.greater_is_better,
        "base_model": job.loaded.base_model,
        "seconds": round(seconds, 3),
        "seed": trainer.args.seed,
        "environment": environment(device, dtype),
    }


def _sizes(job: _Job, dense: nn.Module, metric: dict[str, float]) -> dict[str, Any]:
    """The members of an exported family, measured."""
    if job.recipe.pruning.export_sizes is None:
        return {}
    batches = job.recipe.output.batch_sizes
    return {"sizes": measured_sizes(job.trainer, dense, metric, _is_own(dense), job.example(), batches)}


def _conditions(job: _Job) -> dict[str, Any]:
    """How a language model was evaluated, without which a perplexity says nothing."""
    length = job.data.facts.get("block_size")
    if length is None:
        return {}
    args, dtype = job.trainer.args, str(next(job.model.parameters()).dtype).removeprefix("torch.")
    for short, name in (("bf16", "bfloat16"), ("fp16", "float16")):
        if getattr(args, f"{short}_full_eval"):
            dtype = name
        elif getattr(args, short):
            dtype = f"{name} (mixed precision)"
    return {"evaluation": {"sequence_length": length, "stride": length, "dtype": dtype}}


def _measure_both(job: _Job, dense: nn.Module, pruned: nn.Module) -> tuple[Measurement, Measurement]:
    """Dense and pruned in turns, so that what else the machine does falls on both; the quicker of two turns counts."""
    example = job.example()
    sizes = tuple(job.recipe.output.batch_sizes)
    rounds = [(measure(dense, example, sizes), measure(pruned, example, sizes)) for _ in range(2)]
    return tuple(min(turns, key=lambda m: sum(m.latency_ms.values())) for turns in zip(*rounds, strict=True))


def _write(job: _Job, report: dict[str, Any], dense: nn.Module) -> None:
    """Writes the whole result to the side, proves that it loads again, and moves it into place."""
    with side_folder(job.folder) as side:
        sparse = job.recipe.output.sparse
        save_pretrained(job.model, side, job.trainer.masks, job.loaded.processing_class, sparse=sparse)
        _prove(job, side, dense)
        write_text(side / RECIPE_FILE, job.recipe.to_yaml())
        write_text(side / REPORT_FILE, json.dumps(report, indent=2) + "\n")
        if report["sparsity"]:
            sparsity_plot(report, side / "sparsity.png")
        if "removed" in report:
            units_plot(report, side / "units.png")
        trajectory_plot(report, side / "trajectory.png")
        write_card(
            side,
            report,
            name=job.folder.resolve().name,
            recipe_yaml=job.recipe.to_yaml(),
            kind=_kind(job.model),
            loading=_loading(job.model, job.folder, sparse is not None),
        )


def _prove(job: _Job, folder: Path, dense: nn.Module) -> None:
    """Loads the saved model and compares every tensor, bit for bit, and what it answers.

    Answers may round differently: kernels look at how tensors lie in memory.
    """
    model = job.model
    verify(folder).raise_if_bad(folder)
    loaded = from_pretrained(folder, copy.deepcopy(dense).cpu() if _is_own(model) else None, check=False)
    values = loaded.state_dict()
    for name, value in model.state_dict().items():
        if name not in values or not torch.equal(values[name].cpu(), value.cpu()):
            raise CheckpointError(f"'{name}' does not load again as it was saved; nothing was written")
    args, kwargs = example_batch(model, job.example())
    with torch.no_grad():
        loaded = loaded.to(next(model.parameters()).device)
        said, again = (main_outputs(one.eval()(*args, **kwargs)) for one in (model, loaded))
    if not all(torch.allclose(one, other, 1e-3, 1e-4) for one, other in zip(said, again, strict=True)):
        raise CheckpointError("the saved model does not answer as the one that was saved; nothing was written")


def _kind(model: nn.Module) -> str:
    if is_timm(model) or type(model).__name__.startswith("TimmWrapper"):
        return "timm"
    return "transformers" if isinstance(model, PreTrainedModel) else "module"


def _loading(model: nn.Module, folder: Path, sparse: bool) -> str:
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
    if sparse or getattr(model.config, "quantization_config", None) is not None:  # not for the libraries alone
        return f"import hfprune\n{lines}"
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
    if "removed" in report:
        console.print(removed_table(report))
    if "sizes" in report:
        console.print(sizes_table(report))
    console.print(comparison_table(report))
    console.print(f"\nsaved to {folder}: model, card (README.md), {REPORT_FILE}, pictures, recipe", highlight=False)
