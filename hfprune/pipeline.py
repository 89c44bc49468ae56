"""run(recipe): the whole way from a recipe to a measured, documented checkpoint that loads again."""

from __future__ import annotations

import copy
import json
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
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
from hfprune.checkpoint.tensors import bytes_on_disk
from hfprune.checkpoint.verify import verify
from hfprune.config import PruningConfig
from hfprune.data import PreparedData, open_data, prepare
from hfprune.data.sources import is_on_hub
from hfprune.errors import CheckpointError, ConfigError, NotReachable
from hfprune.folders import clear_way, ended_run, reserved
from hfprune.hub.card import RECIPE_FILE, REPORT_FILE, check_template, write_card
from hfprune.hub.push import open_repo, push_to_hub
from hfprune.metrics import Metrics, metrics_for
from hfprune.models import LoadedModel, load_model
from hfprune.profiling import Measurement, example_batch, measure
from hfprune.recipe import Recipe
from hfprune.report.emissions import emissions
from hfprune.report.environment import environment
from hfprune.report.plots import sparsity_plot, trajectory_plot, units_plot
from hfprune.report.tables import comparison_table, removed_table, sizes_table, steps_table, strategy_sentence
from hfprune.structure.graph import main_outputs
from hfprune.training.arguments import recipe_keys, training_arguments
from hfprune.training.checkpoints.folder import clear, last_checkpoint
from hfprune.training.family import measured_sizes
from hfprune.training.logs import part_runs
from hfprune.training.phases import numbers
from hfprune.training.rehearsal import check_watched, nothing_made, rehearse
from hfprune.training.trainer import PruningTrainer
from hfprune.training.world import check_world

DENSE_FOLDER = "dense"
DENSE_FILE = "dense.json"
"""Written last into the dense folder: it says that the dense model is complete, and how good it is."""


@dataclass
class Job:
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
        report = ended_run(recipe, folder)
        # The arguments say on what to run, and with that which of several processes this one is.
        if training_arguments(recipe.output.folder, recipe.training, task=recipe.data.task).process_index == 0:
            _show(report, console, folder, ended=True)
            _push(recipe, console)
        return report
    job = prepare_run(recipe, console)
    if recipe.output.push_to_hub and PartialState().is_main_process:
        # Whoever may not write there learns it before the training, not after it.
        open_repo(recipe.output.push_to_hub, recipe.output.private, recipe.output.revision)
    with reserved(folder) if PartialState().is_main_process else nullcontext():
        _carry_out(job, resume)
    if PartialState().is_main_process:
        _push(recipe, console)
    return json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))


def _carry_out(job: Job, resume: bool) -> None:
    """All that takes time, and all that is written."""
    recipe, folder, console = job.recipe, job.folder, job.console
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            clear_way(folder, recipe, resume, console)
    last = last_checkpoint(folder) if resume else None
    # Of a run that was interrupted only the rest is seen, which says nothing of the whole.
    whole = not (resume and (last or (folder / DENSE_FOLDER).is_dir()))
    began = time.perf_counter()
    with emissions(follow=whole and PartialState().is_main_process) as spent:
        dense_metric = train_dense(job, resume)
        dense = job.trainer.copied_model()
        if last is not None and PartialState().is_main_process:
            console.print(f"resuming from {last}", highlight=False)
        job.trainer.train(resume_from_checkpoint=str(last) if last else None)
        pruned_metric = numbers(job.trainer.evaluate())
    if job.trainer.shards is not None:
        job.trainer.end_sharding()
        job = replace(job, model=job.trainer.model)
    if PartialState().is_main_process:
        # One process measures while the others rest.
        seconds = {"seconds": round(time.perf_counter() - began, 3)} if whole else {}
        report = _report(job, dense, dense_metric, pruned_metric) | seconds | ({"emissions": spent} if spent else {})
        _write(job, report, dense)
        _show(report, console, folder)
    PartialState().wait_for_everyone()


def prepare_run(recipe: Recipe, console: Console | None = None) -> Job:
    """Opens the data and the model and checks that all parts of the recipe fit; nothing is trained or written."""
    folder = Path(recipe.output.folder)
    if folder.is_file():
        raise ConfigError(f"output.folder: '{folder}' is a file; name a folder")
    if recipe.output.template is not None:
        check_template(recipe.output.template)
    metrics = metrics_for(recipe.data.metrics, recipe.data.task, recipe.data.language)
    arguments = _arguments(recipe, metrics)
    check_world(arguments)
    if recipe.baseline is not None:
        _dense_arguments(recipe, metrics)
    raw = open_data(recipe.data, arguments.seed)
    set_seed(arguments.seed)
    loaded = load_model(recipe.model, recipe.data.task, raw.labels)
    data = prepare(raw, loaded.model, loaded.processing_class, arguments.seed)
    metrics = metrics.read_by(loaded.processing_class)
    if "left_out" in data.facts and PartialState().is_main_process:
        (console or Console()).print(data.facts["left_out"], markup=False, highlight=False)
    check_watched(recipe, metrics)
    # Arguments are made right before their trainer: accelerate knows one precision at a time.
    if recipe.baseline is not None:
        keys = recipe_keys(recipe.training, recipe.baseline)
        with nothing_made(folder / DENSE_FOLDER, keys):
            rehearse(make_trainer(loaded, data, metrics, _dense_arguments(recipe, metrics)), keys)
    keys = recipe_keys(recipe.training)
    with nothing_made(folder / DENSE_FOLDER, keys):
        trainer = make_trainer(
            loaded, data, metrics, _arguments(recipe, metrics), recipe.pruning, recipe.output.push_every_step
        )
        rehearse(trainer, keys)
    trainer.saving = _saving(recipe)
    if console is not None:
        trainer.tell = partial(console.print, markup=False, highlight=False)
    if trainer.choice and trainer.is_world_process_zero():
        (console or Console()).print(trainer.choice, markup=False, highlight=False)
    return Job(recipe, folder, loaded.model, loaded, data, metrics, trainer, console or Console())


def _arguments(recipe: Recipe, measured: Metrics) -> TrainingArguments:
    watched = _watched(recipe, measured)
    arguments = training_arguments(recipe.output.folder, recipe.training, **watched)
    output = recipe.output
    # Where to push; Trainer itself pushes nothing.
    arguments.hub_model_id = output.push_to_hub or None
    arguments.hub_private_repo, arguments.hub_revision = output.private, output.revision
    return arguments


def _watched(recipe: Recipe, measured: Metrics) -> dict[str, Any]:
    return {"metric": measured.main, "greater_is_better": measured.greater_is_better, "task": recipe.data.task}


def _dense_arguments(recipe: Recipe, measured: Metrics) -> TrainingArguments:
    watched = _watched(recipe, measured)
    folder = str(Path(recipe.output.folder) / DENSE_FOLDER)
    return training_arguments(folder, recipe.training, recipe.baseline, **watched)


def make_trainer(
    loaded: LoadedModel,
    data: PreparedData,
    metrics: Metrics,
    arguments: TrainingArguments,
    pruning: PruningConfig | None = None,
    push_every_step: bool = False,
    kind: type[PruningTrainer] = PruningTrainer,
) -> PruningTrainer:
    """A trainer of a recipe's parts; `kind` is its class."""
    return kind(
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
        push_every_step=push_every_step,
    )


# ---- dense ---------------------------------------------------------------------------------------------------------


def train_dense(job: Job, resume: bool) -> dict[str, float]:
    """The dense model's metrics, after training it where the recipe has a baseline; a finished one is taken up."""
    folder = job.folder / DENSE_FOLDER
    if job.recipe.baseline is None:
        return numbers(job.trainer.evaluate())
    if resume and (folder / DENSE_FILE).is_file():
        state = from_pretrained(folder, job.model if _is_own(job.model) else None).state_dict()
        job.model.load_state_dict(state)
        if PartialState().is_main_process:
            clear(folder)  # what a kill left
        return json.loads((folder / DENSE_FILE).read_text(encoding="utf-8"))["metric"]
    trainer = make_trainer(job.loaded, job.data, job.metrics, _dense_arguments(job.recipe, job.metrics))
    last = last_checkpoint(folder) if resume else None
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    metric = numbers(trainer.evaluate())
    part_runs(trainer.callback_handler)
    with trainer.whole_model() as model:
        if PartialState().is_main_process:
            save_pretrained(model, folder, processing_class=job.loaded.processing_class)
    if PartialState().is_main_process:
        write_text(
            folder / DENSE_FILE,
            json.dumps({"metric": metric, "optimizer_steps": trainer.state.global_step}, indent=2) + "\n",
        )
        clear(folder)
    return metric


def _is_own(model: nn.Module) -> bool:
    return not isinstance(model, PreTrainedModel) and not is_timm(model)


# ---- the result ----------------------------------------------------------------------------------------------------


def _report(
    job: Job, dense: nn.Module, dense_metric: dict[str, float], pruned_metric: dict[str, float]
) -> dict[str, Any]:
    trainer, model = job.trainer, job.model
    before, after = _measure_both(job, dense.to(next(model.parameters()).device), model)
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    return {
        "dense": {"metric": dense_metric, **before.to_dict()},
        "pruned": {"metric": pruned_metric, **after.to_dict()},
        "steps": [step.to_dict() for step in trainer.steps],
        "sparsity": block_of(model)["sparsity"],
        **({"collapses": trainer.progress.collapses} if trainer.progress.collapses else {}),
        **trainer.method.report(),
        **({"strategy": trainer.course.report()} if trainer.course is not None else {}),
        **_sizes(job, dense, dense_metric),
        **_conditions(job),
        "recipe": job.recipe.model_copy(update={"pruning": trainer.pruning}).model_dump(mode="json"),
        **({"schedule_choice": trainer.choice} if trainer.choice else {}),
        "main_metric": job.metrics.main,
        "greater_is_better": job.metrics.greater_is_better,
        "base_model": job.loaded.base_model,
        **_lineage(job),
        "seed": trainer.args.seed,
        "environment": environment(device, dtype),
    }


def _lineage(job: Job) -> dict[str, Any]:
    """Where the model and its data come from, as a card says it."""
    origin = dict(job.loaded.origin)
    if is_on_hub(job.recipe.data.name):
        origin["datasets"] = list(dict.fromkeys([job.recipe.data.name, *origin.get("datasets", [])]))
    found = {"origin": origin, "maker": job.loaded.maker}
    return {key: value for key, value in found.items() if value}


def _sizes(job: Job, dense: nn.Module, metric: dict[str, float]) -> dict[str, Any]:
    """The members of an exported family, measured."""
    if job.recipe.pruning.export_sizes is None:
        return {}
    batches = job.recipe.output.batch_sizes
    return {"sizes": measured_sizes(job.trainer, dense, metric, _is_own(dense), job.example(), batches)}


def _conditions(job: Job) -> dict[str, Any]:
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


def _measure_both(job: Job, dense: nn.Module, pruned: nn.Module) -> tuple[Measurement, Measurement]:
    """Dense and pruned in turns, so that what else the machine does falls on both; the quicker of two turns counts."""
    example = job.example()
    sizes = tuple(job.recipe.output.batch_sizes)
    rounds = [(measure(dense, example, sizes), measure(pruned, example, sizes)) for _ in range(2)]
    return tuple(min(turns, key=lambda m: sum(m.latency_ms.values())) for turns in zip(*rounds, strict=True))


def _write(job: Job, report: dict[str, Any], dense: nn.Module) -> None:
    """Writes the whole result to the side, proves that it loads again, and moves it into place."""
    with side_folder(job.folder) as side:
        save_pretrained(job.model, side, job.trainer.masks, job.loaded.processing_class, **_saving(job.recipe))
        _prove(job, side, dense)
        if job.recipe.output.sparse is not None:
            report["stored_sparse"] = True
            report["pruned"]["bytes"] = bytes_on_disk(side)
        write_text(side / RECIPE_FILE, job.recipe.to_yaml())
        write_text(side / REPORT_FILE, json.dumps(report, indent=2) + "\n")
        if report["sparsity"]:
            sparsity_plot(report, side / "sparsity.png")
        if "removed" in report:
            units_plot(report, side / "units.png")
        trajectory_plot(report, side / "trajectory.png")
        write_card(side, report, name=job.folder.resolve().name, template=job.recipe.output.template)


def _saving(recipe: Recipe) -> dict[str, Any]:
    """How the recipe wants checkpoints to be stored."""
    return {"sparse": recipe.output.sparse, "remote_code": recipe.output.remote_code}


def _prove(job: Job, folder: Path, dense: nn.Module) -> None:
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


def _show(report: dict[str, Any], console: Console, folder: Path, ended: bool = False) -> None:
    if ended:
        console.print(f"the run in {folder} has ended already; this is its result", highlight=False)
    if report["steps"]:
        console.print(steps_table(report))
    if sentence := strategy_sentence(report):
        console.print(sentence, highlight=False)
    if "removed" in report:
        console.print(removed_table(report))
    if "sizes" in report:
        console.print(sizes_table(report))
    console.print(comparison_table(report))
    console.print(f"\nsaved to {folder}: model, card (README.md), {REPORT_FILE}, pictures, recipe", highlight=False)


def _push(recipe: Recipe, console: Console) -> None:
    """Pushes the result where the recipe says so; it is whole on the disk whatever happens."""
    output = recipe.output
    if not output.push_to_hub:
        return
    tell = partial(console.print, markup=False, highlight=False)
    try:
        commit = push_to_hub(
            output.folder, output.push_to_hub, private=output.private, revision=output.revision, tell=tell
        )
    except NotReachable as error:
        raise NotReachable(f"{error}; the result is whole in '{output.folder}': --resume pushes it") from error
    tell(f"pushed: {commit.commit_url}")
