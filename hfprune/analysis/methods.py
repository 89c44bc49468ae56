"""Methods beside each other: what each of them means for a model, and what the model that it leaves costs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from hfprune.checkpoint.save import save_pretrained
from hfprune.checkpoint.tensors import bytes_on_disk
from hfprune.config import PruningConfig
from hfprune.criteria import check_granularity, create
from hfprune.errors import ConfigError
from hfprune.grid import Cell
from hfprune.masks import MaskSet
from hfprune.methods import UNSTRUCTURED
from hfprune.profiling import measure
from hfprune.pruner import Pruner
from hfprune.target import Target
from hfprune.training.choice import family_of
from hfprune.training.trainer import PruningTrainer

_TURNS, _REPEATS = 9, 3
"""How often the dense model and another are timed in turns, and how many samples a turn takes."""


def applicable(cells: Iterable[Cell]) -> tuple[list[Cell], list[str]]:
    """The runs whose criterion can score what their method removes, and a line on each criterion that is left out.

    Raises:
        ConfigError: an unknown criterion, one that was named for the method itself, or none is left for a method.
    """
    kept: list[Cell] = []
    left_out: dict[tuple[str, str], str] = {}
    for cell in cells:
        if cell.method is not None and (reason := _unfit(cell)):
            if cell.method.criteria is not None:
                raise ConfigError(f"compare.methods.{cell.method.name}.criteria: {reason}")
            left_out[cell.method.name, cell.criterion_words] = reason
            continue
        kept.append(cell)
    going = {cell.method.name for cell in kept if cell.method is not None}
    for (method, _), reason in left_out.items():
        if method not in going:
            raise ConfigError(f"compare.criteria: none of them can score what '{method}' removes; {reason}")
    return kept, [f"{method} without {criterion}: {reason}" for (method, criterion), reason in left_out.items()]


def _unfit(cell: Cell) -> str:
    """Why a criterion can't score a method's units; empty where it can."""
    config = cell.pruning
    criterion = create(config.criterion_name, config.criterion_parameters)
    try:
        check_granularity(criterion, config.criterion_name, config.granularities)
    except ConfigError as error:
        return str(error).removeprefix("pruning.criterion: ")
    return ""


def fitted(cell: Cell, model: nn.Module) -> PruningConfig:
    """What a run does with a model: its size as a share of the weights where these are zeroed, and channels in place of
    heads and neurons where the model has no attention and the recipe left that open.

    Args:
        cell: the run.
        model: still dense.

    Raises:
        ConfigError: the size can't be reached, because too little of the model is prunable.
    """
    config, method = cell.pruning, cell.method
    if method is None:
        return config
    if method.is_open and family_of(model) in ("convolutional", "other"):
        return config.model_copy(update={"granularity": "channel"})
    if method.kind != UNSTRUCTURED:
        return config
    whole = sum(parameter.numel() for parameter in model.parameters())
    prunable = sum(weight.parameter.numel() for weight in Pruner(model, config).weights.values())
    share = cell.ratio * whole / prunable if prunable else 1.0
    if share >= 1:
        raise ConfigError(f"{1 - prunable / whole:.2%} of the parameters are no weights to prune (embeddings, norms, "
                          f"biases), and the rest can't all go")  # fmt: skip
    return config.model_copy(update={"target": Target(ratio=share)})


def stored_bytes(model: nn.Module, masks: MaskSet | None, folder: Path) -> int:
    """The size of a model's checkpoint on disk: zeros as bitmasks, where any are held. It is written to a temporary
    folder inside another and taken away again."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as side:
        zeros = masks is not None and masks.zeros > 0
        save_pretrained(model, side, masks if zeros else None, sparse="bitmask" if zeros else None)
        return bytes_on_disk(side)


class Scale:
    """Weighs what a run leaves beside the dense model.

    Args:
        dense: the dense model.
        example: one example, as the models take it.
        batch_sizes: for latency.
        folder: where there is room for a checkpoint.
    """

    def __init__(self, dense: nn.Module, example: Any, batch_sizes: Sequence[int], folder: Path):
        self.dense, self.example, self.batch_sizes, self.folder = dense, example, tuple(batch_sizes), folder
        found = measure(dense, example, latency=False)
        self.size = {"params": found.params, "macs": found.macs, "bytes": stored_bytes(dense, None, folder)}

    def weigh(self, trainer: PruningTrainer) -> dict[str, Any]:
        """Parameters, non-zeros, MACs, bytes on disk, and latency in turns with the dense model.

        Returns:
            `params`, `nonzero`, `macs`, `bytes`, `size` (non-zeros over the dense model's parameters); `latency_ms`,
            `dense_latency_ms` and `speedup`, each by batch size, medians over the turns (the speed-up of the ratios
            of neighbouring turns, which a machine that slows down for a while touches alike); `dense`: its params,
            macs and bytes.
        """
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        device = next(model.parameters()).device
        turns: dict[str, list[dict[int, float]]] = {"own": [], "dense": []}
        try:
            self.dense.to(device)
            for _ in range(_TURNS):
                for name, one in (("dense", self.dense), ("own", model)):
                    found = measure(one, self.example, self.batch_sizes, repeats=_REPEATS)
                    turns[name].append(found.latency_ms)
        finally:
            self.dense.cpu()
        # The last turn was the model's own.
        own, dense = (
            {str(batch): statistics.median(turn[batch] for turn in turns[name]) for batch in self.batch_sizes}
            for name in ("own", "dense")
        )
        return {
            "params": found.params,
            "nonzero": found.nonzero,
            "macs": found.macs,
            "bytes": stored_bytes(model, trainer.masks, self.folder),
            "size": found.nonzero / self.size["params"],
            "latency_ms": own,
            "dense_latency_ms": dense,
            "speedup": {str(batch): _ratio(turns, batch) for batch in self.batch_sizes},
            "dense": self.size,
        }


def _ratio(turns: dict[str, list[dict[int, float]]], batch: int) -> float:
    pairs = zip(turns["dense"], turns["own"], strict=True)
    return statistics.median(dense[batch] / own[batch] for dense, own in pairs)
