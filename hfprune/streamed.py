"""run_streamed(recipe): a recipe that trains nothing, from a checkpoint on the disk to another, block by block."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from torch.utils.data import DataLoader, Subset

from hfprune.checkpoint.convert import Tell
from hfprune.checkpoint.files import write_text
from hfprune.checkpoint.tensors import bytes_on_disk
from hfprune.criteria import create
from hfprune.data import open_data, prepare
from hfprune.errors import ConfigError
from hfprune.folders import reserved
from hfprune.hub.card import RECIPE_FILE
from hfprune.processing import processing_class_of
from hfprune.profiling import human_bytes
from hfprune.recipe import Recipe
from hfprune.streaming import StreamReport, prune_checkpoint
from hfprune.streaming.source import Source, stored_dtype
from hfprune.training.arguments import training_arguments

ONLY = "--stream prunes a checkpoint on this machine and trains nothing"


def run_streamed(recipe: Recipe, console: Console | None = None, progress: Tell | None = None) -> StreamReport:
    """Prunes the checkpoint that a recipe names without loading it, and writes the folder that it names.

    Args:
        recipe: `model.name` is a folder of safetensors; no baseline, no fine-tuning. The data is that of a run in
            memory: the same batches for criteria that need some, and none for the others.
        console: where the bound on memory and the end are told; by default the standard output.
        progress: hears how far it is.

    Raises:
        HfpruneError: one line that names what is wrong; what was in the output folder is unchanged.
    """
    console = console or Console()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    _check(recipe)
    folder = Path(recipe.output.folder)
    with reserved(folder):
        report = prune_checkpoint(
            Path(recipe.model.name).expanduser(),
            folder,
            recipe.pruning,
            _batches(recipe),
            sparse=recipe.output.sparse,
            progress=progress,
            say=say,
        )
        write_text(folder / RECIPE_FILE, recipe.to_yaml())
    size = bytes_on_disk(folder)
    gone = f"{report.pruned:,} of {report.units:,} units ({report.pruned / max(1, report.units):.2%})"
    say(f"pruned {gone}; saved to {folder}: {human_bytes(size)} of tensors, config with metadata, recipe")
    return report


def _check(recipe: Recipe) -> None:
    """Refuses what only a model in memory can do."""
    model, recovery = recipe.model, recipe.pruning.recovery
    if not Path(model.name).expanduser().is_dir():
        raise ConfigError(f"model.name: '{model.name}' is no folder; {ONLY}: download it first (hf download)")
    if not model.pretrained:
        raise ConfigError(f"model.pretrained: false; {ONLY}")
    if other := [key for key in model.args if key != "dtype"]:
        raise ConfigError(f"model.args.{other[0]}: {ONLY}, with the config that it has; leave it out")
    stored = stored_dtype(Path(model.name).expanduser())
    if (dtype := model.args.get("dtype")) is not None and str(dtype) != stored:
        raise ConfigError(f"model.args.dtype: {dtype}, but the checkpoint holds {stored}, which --stream keeps")
    if recipe.baseline is not None:
        raise ConfigError(f"baseline: {ONLY}; leave it out (--set baseline=null)")
    if recovery.epochs != 0 and recovery.steps != 0:
        raise ConfigError(f"pruning.recovery.epochs: {ONLY}; say so (--set pruning.recovery.epochs=0)")
    if recipe.output.push_to_hub:
        raise ConfigError("output.push_to_hub: --stream pushes nothing; push the folder afterwards (hfprune push)")
    if PartialState().num_processes > 1:
        raise ConfigError("--stream: runs in one process; start it without a launcher")


def _batches(recipe: Recipe) -> Any:
    """The batches that the criterion looks at, drawn as `PruningTrainer` draws them; None where it needs none."""
    config = recipe.pruning
    criterion = create(config.criterion_name, config.criterion_parameters)
    if not (criterion.needs_data or criterion.layerwise):
        return None
    arguments = training_arguments(recipe.output.folder, recipe.training, task=recipe.data.task)
    raw = open_data(recipe.data, arguments.seed)
    source = Source.open(Path(recipe.model.name).expanduser())
    tokens = processing_class_of(source.folder, recipe.model, recipe.data.task)
    data = prepare(raw, source.model, tokens, arguments.seed)
    seed = config.seed if config.seed is not None else arguments.seed
    size = arguments.per_device_train_batch_size
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    chosen = Subset(data.train, order[: criterion.batches * size].tolist())
    return DataLoader(chosen, batch_size=size, collate_fn=data.collator)
