"""Study: speech made at stated conditions, a recogniser trained on it and pruned at several ratios, and where each of
them breaks. Every part that is complete is taken up again."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from hfprune.checkpoint.files import write_text
from hfprune.config import PruningConfig
from hfprune.errors import CheckpointError, ConfigError
from hfprune.folders import differences, reserved
from hfprune.hub.card import RECIPE_FILE
from hfprune.pipeline import DENSE_FILE, DENSE_FOLDER, prepare_run, train_dense
from hfprune.pipeline import run as run_recipe
from hfprune.recipe import Recipe, load_yaml
from hfprune.report.tables import percent
from hfprune.speech.corpus import training_set, wild_set
from hfprune.strict import one_line
from hfprune.study import Study
from hfprune.wild.folder import plan_folder
from hfprune.wild.made import Tell, write_recordings
from hfprune.wild.report_card import write_section
from hfprune.wild.report_records import read_records
from hfprune.wild.reports import WildReport, report
from hfprune.wild.run import run as run_plan
from hfprune.wild.summary import summary

SPEECH = "speech"
STUDY_FILE, PLAN_FILE = "study.json", "plan.json"


def run_study(recipe: Recipe, console: Console | None = None, tell: Tell | None = None) -> WildReport:
    """The whole study that a recipe's section `wild:` names, in `output.folder`: `speech/` with the recordings, the
    dense recogniser in `dense/`, a folder such as `pruned-0.5/` a ratio, the plan, the database and the report.

    What is complete is not made again; the same call goes on after an interruption, also with more ratios.

    Example:
        >>> found = run_study(Recipe.from_yaml("recipes/wild_local.yaml"))
        >>> found.data["ranked"][0]["slice"]

    Args:
        recipe: its data is made here, whatever `data.name` says; `pruning.target` takes each of the ratios.
        console: where lines and tables go; by default the standard output.
        tell: is told of progress: words, how much is done, of how much.

    Raises:
        HfpruneError: one line that names what is wrong.
    """
    console, tell = console or Console(), tell or (lambda *_: None)
    if recipe.data.task != "speech-recognition":
        raise ConfigError(f"data.task: a study trains a recogniser; speech-recognition, not {recipe.data.task}")
    if recipe.wild is None or recipe.baseline is None:
        raise ConfigError(f"{'wild' if recipe.wild is None else 'baseline'}: missing; a study needs this section")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("wild study: runs in one process; start it without a launcher")
    folder, began = Path(recipe.output.folder), time.monotonic()
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"name": str(folder / SPEECH / "train")})})
    runs = {ratio: _pruned_recipe(recipe, ratio) for ratio in recipe.wild.ratios}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"output.folder: can't write to '{folder}': {error.strerror}") from error
    with reserved(folder):
        _make_speech(recipe.wild, folder, console, tell)
        _train(recipe, next(iter(runs.values())), folder, console)
        for run in runs.values():
            run_recipe(run, resume=True, console=console)
        models = [str(folder / DENSE_FOLDER), *(run.output.folder for run in runs.values())]
        found = _test(folder, models, console, tell)
    console.print(f"the study is in {folder}; this call took {_duration(time.monotonic() - began)}", highlight=False)
    return found


def _pruned_recipe(recipe: Recipe, ratio: float) -> Recipe:
    """The recipe of one pruned recogniser, which begins with the dense one of the study."""
    base, folder = recipe.pruning, Path(recipe.output.folder)
    kind = base.target.kind if base.target is not None else "ratio"
    target = {kind: ratio if kind == "ratio" else round(1 - ratio, 9)}
    try:
        pruning = PruningConfig.model_validate(base.model_dump(exclude_unset=True) | {"target": target})
    except ValidationError as error:
        raise ConfigError(f"wild.ratios: {ratio:g}: {one_line(error, 'pruning')}") from error
    nothing = {"push_to_hub": False, "push_every_step": False, "private": None, "revision": None}
    model = {"name": str(folder / DENSE_FOLDER), "args": {}, "pretrained": True, "revision": None}
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update=model),
            "baseline": None,
            "pruning": pruning,
            "output": recipe.output.model_copy(update={"folder": str(folder / f"pruned-{ratio:g}"), **nothing}),
            "wild": None,
        }
    )


def _check_same(before: Any, now: Any, folder: Path) -> None:
    """Refuses a folder in which another study was begun, naming the first key that differs."""
    for key, old, new in differences(before, now):
        raise ConfigError(f"{key}: {new!r} now, but the study in '{folder}' was begun with {old!r}; "
                          f"name another output.folder")  # fmt: skip


def _of_speech(study: Study) -> dict[str, Any]:
    """What the recordings depend on."""
    return {"wild": study.model_dump(mode="json", exclude={"ratios"})}


def _of_training(recipe: Recipe) -> dict[str, Any]:
    """What all the models of a study share."""
    values = recipe.model_dump(mode="json", exclude={"output", "compare", "wild"})
    values["data"].pop("name")
    values["pruning"].pop("target")
    return values


def _make_speech(study: Study, folder: Path, console: Console, tell: Tell) -> None:
    record = folder / STUDY_FILE
    if record.is_file():
        _check_same(json.loads(record.read_text(encoding="utf-8")), _of_speech(study), folder)
    write_text(record, json.dumps(_of_speech(study), indent=2) + "\n")
    under = 1 + sum(len(levels) for levels in study.conditions.values())
    tests = len(study.languages) * (study.test * under + study.long)
    parts = {"train": (training_set, study.train + study.held_out), "wild": (wild_set, tests)}
    for name, (make, count) in parts.items():
        write_recordings(folder / SPEECH / name, make(study), count, tell)
        console.print(f"{folder / SPEECH / name}: {count} recordings", highlight=False)


def _train(recipe: Recipe, first: Recipe, folder: Path, console: Console) -> None:
    """The dense recogniser, unless it is there."""
    path = folder / RECIPE_FILE
    if path.is_file():
        before = Recipe.parse(load_yaml(path.read_text(encoding="utf-8")))
        _check_same(_of_training(before), _of_training(recipe), folder)
    if (folder / DENSE_FOLDER / DENSE_FILE).is_file():
        return
    job = prepare_run(recipe.model_copy(update={"pruning": first.pruning}), console)
    write_text(path, recipe.to_yaml())
    metric = train_dense(job, resume=True)
    console.print(f"dense: {job.metrics.main} {percent(metric[job.metrics.main])} on clean speech", highlight=False)


def _test(folder: Path, models: list[str], console: Console, tell: Tell) -> WildReport:
    """The plan, the test of all models, and the report; its rows stand in the pruned models' cards too."""
    plan = folder / PLAN_FILE
    if not plan.is_file():
        plan_folder(folder / SPEECH / "wild", name="wild study").write(plan)
    number = run_plan(plan, models, folder, tell=tell)
    found = report(folder)
    folders = read_records(folder).folders
    for model in models[1:]:
        write_section(model, found.data, folders)
    console.print(summary(folder, number), highlight=False)
    console.print(found.table())
    console.print(f"saved to {folder}: {', '.join(found.files)}", highlight=False)
    return found


def _duration(seconds: float) -> str:
    return f"{round(seconds)} s" if seconds < 100 else f"{seconds / 60:.1f} minutes"
