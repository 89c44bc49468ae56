"""What can be known of a training before it begins: whether its arguments suit the model, the data and this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import is_liger_kernel_available

from hfprune.errors import CheckpointError, ConfigError, HfpruneError, NotReachable
from hfprune.metrics import Metrics, metrics
from hfprune.recipe import Recipe
from hfprune.registry import did_you_mean
from hfprune.training.arguments import key_named_in


def check_watched(recipe: Recipe, measured: Metrics) -> None:
    """Refuses to watch a metric that is not among those measured, where all of these are known by name."""
    names = recipe.data.metrics or [measured.main]
    if not all(name in metrics for name in names):
        return
    watched = {
        "pruning.recovery.monitor": recipe.pruning.recovery.monitor,
        "training.metric_for_best_model": recipe.training.get("metric_for_best_model"),
        "baseline.metric_for_best_model": (recipe.baseline or {}).get("metric_for_best_model"),
    }
    for key, name in watched.items():
        short = (name or "loss").removeprefix("eval_")
        if short not in {*names, "loss"}:
            raise ConfigError(f"{key}: '{short}' is not measured; {did_you_mean(short, [*names, 'loss'])}")


@contextmanager
def nothing_made(folder: Path, keys: dict[str, str]) -> Iterator[None]:
    """Takes away the empty folders that Trainer makes as soon as it is made; what it raises becomes one line.

    Args:
        folder: the trainer's own; the one that it lies in is taken away too where it was not there before.
        keys: the recipe's keys of the arguments.
    """
    folders = [path for path in (folder, folder.parent) if not path.exists()]
    try:
        yield
    except HfpruneError:
        raise
    except (ConnectionError, HfHubHTTPError) as error:
        raise NotReachable(f"training: {' '.join(str(error).split())[:300]}") from error
    except OSError as error:
        raise CheckpointError(
            f"output.folder: can't write to '{error.filename or folder}': {error.strerror or error}"
        ) from error
    except (ValueError, TypeError, ImportError, RuntimeError, AttributeError) as error:
        raise ConfigError(f"{key_named_in(error, keys)}: {' '.join(str(error).split())[:300]}") from error
    finally:
        for path in folders:
            with suppress(OSError):
                path.rmdir()


def rehearse(trainer: Trainer, keys: dict[str, str]) -> None:
    """Refuses what Trainer would stumble over only while it trains; the trainer is left as it was.

    Args:
        trainer: with the data and arguments of a recipe.
        keys: the recipe's keys of the arguments (`arguments.recipe_keys`).

    Raises:
        ConfigError: one line that names the key.
    """
    for name, reason in _unsuited(trainer):
        raise ConfigError(f"{keys.get(name, f'training.{name}')}: {reason}")
    _try(trainer.create_optimizer, ("optim_args", "optim"), keys)
    schedule = partial(trainer.create_scheduler, num_training_steps=10)
    _try(schedule, ("lr_scheduler_kwargs", "lr_scheduler_type"), keys)
    trainer.optimizer = trainer.lr_scheduler = None


def _unsuited(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """The arguments that do not suit, each with what is wrong."""
    args, rows = trainer.args, trainer.train_dataset
    batch = args.train_batch_size * (1 if args.accelerator_config.split_batches else args.world_size)
    if args.dataloader_drop_last and len(rows) < batch:
        yield "dataloader_drop_last", f"{len(rows)} training rows do not fill one batch of {batch}, so none is left"
    by_length = args.train_sampling_strategy in ("group_by_length", "batch_rebalance")
    if by_length and not {"input_ids", "input_values"} & set(rows[0]):
        what = f"'{args.train_sampling_strategy}' is for texts and sound; images have no length"
        yield "train_sampling_strategy", what
    if args.label_names is not None and args.label_names != ["labels"]:
        yield "label_names", f"{args.label_names}, but a batch holds them as 'labels'; leave it out"
    if args.neftune_noise_alpha is not None and input_embeddings(trainer.model) is None:
        yield "neftune_noise_alpha", f"adds noise to embeddings, and {type(trainer.model).__name__} has none"
    if args.dataloader_persistent_workers and args.dataloader_num_workers == 0:
        yield "dataloader_persistent_workers", "there are no workers to keep; set dataloader_num_workers too"
    if args.use_liger_kernel and not is_liger_kernel_available():
        yield "use_liger_kernel", "needs the package liger-kernel, which is not installed"


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that a transformers model calls its input embeddings, where it has one."""
    if not isinstance(model, PreTrainedModel):
        return None
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def _try(make: Callable[[], Any], names: tuple[str, str], keys: dict[str, str]) -> None:
    """Makes what the arguments describe; an error that names none of them is laid to the first of `names` that is said,
    else to the last."""
    try:
        make()
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        key = key_named_in(error, keys)
        if key == "training":
            key = next((keys[name] for name in names if name in keys), f"training.{names[-1]}")
        raise ConfigError(f"{key}: {' '.join(str(error).split())[:300]}") from error
