"""prune_checkpoint(): a checkpoint larger than memory is pruned from files to files, one tensor or block at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from hfprune.checkpoint.convert import Tell, store
from hfprune.checkpoint.files import side_folder
from hfprune.checkpoint.metadata import BLOCK, build_block
from hfprune.checkpoint.save import WEIGHTS_FILES
from hfprune.config import PruningConfig
from hfprune.criteria.visit import visit
from hfprune.errors import CheckpointError, ConfigError
from hfprune.masks import MaskSet
from hfprune.streaming.blocks import StreamedVisit, Unchanged
from hfprune.streaming.bound import Bound, of_storing, of_weights
from hfprune.streaming.result import Result
from hfprune.streaming.source import Source
from hfprune.streaming.units import StreamedUnits, bound_of, config_values, cut, lay_out, write
from hfprune.streaming.weights import NOTHING, StreamedPruner

POINTWISE, WHOLE = 4, 64
"""Bytes an element beside the weight itself: for scores made a slice at a time, and for a whole layer's at once."""

Say = Callable[[str], None]
Hear = Callable[[Bound], Bound]


@dataclass(frozen=True)
class StreamReport:
    """What `prune_checkpoint` did.

    Attributes:
        folder: of the pruned checkpoint.
        achieved: the fraction that is gone, of what the target measures.
        units: how many units there were, and `pruned` how many are gone.
        bound: the most memory that it could take.
        sparsity: the checkpoint's name of each masked tensor → what its metadata says of it; empty for removals.
        note: where the target was not met within 2 %: what stood in the way.
    """

    folder: Path
    achieved: float
    units: int
    pruned: int
    bound: Bound
    sparsity: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    note: str = ""

    def table(self) -> Table:
        """One row a tensor; printable by rich."""
        title = f"{self.pruned:,} of {self.units:,} units pruned ({self.pruned / max(1, self.units):.2%})"
        table = Table(title=title, title_justify="left")
        for column, side in (("tensor", "left"), ("elements", "right"), ("zeros", "right"), ("sparsity", "right")):
            table.add_column(column, justify=side)
        for name, found in self.sparsity.items():
            table.add_row(name, f"{found['numel']:,}", f"{found['zeros']:,}", f"{found['zeros'] / found['numel']:.1%}")
        return table


def prune_checkpoint(
    folder: str | Path,
    output: str | Path,
    config: PruningConfig,
    data: Any = None,
    *,
    sparse: str | None = None,
    progress: Tell | None = None,
    say: Say = print,
) -> StreamReport:
    """Prunes a checkpoint on the disk into another one, without ever holding the whole model in memory.

    The result is what `hfprune.prune` makes of the same model in memory, bit for bit.

    Example:
        >>> report = hfprune.prune_checkpoint("llama", "llama_l1", hfprune.PruningConfig(criterion="l1", target=0.5))

    Args:
        folder: a dense transformers checkpoint as safetensors, in one file or in shards; nothing of it is changed.
        output: the folder of the pruned one, in the same shards; made where it is missing.
        config: what goes, in one step.
        data: for criteria that need it: a batch or an iterable of batches, as for `hfprune.prune`.
        sparse: `bitmask` stores every masked tensor as its values and their places; one file at a time is then held.
        progress: hears how far it is: what is done, how much of it, and of how much.
        say: is told, before anything is pruned, how much memory it may take.

    Raises:
        ConfigError: the configuration asks for what can't be done without the whole model, or lacks data.
        CheckpointError: the folder can't be streamed, or the files could not be written; `output` is then as it was.
        ModelError: a score is not a number, or the model can't take a batch.
    """
    folder, output = Path(folder), Path(output)
    _check(folder, output, config, sparse)
    way = _removed if config.is_structural else _masked
    return way(folder, output, config, data, sparse, progress or _silent, say)


def _masked(
    folder: Path, output: Path, config: PruningConfig, data: Any, sparse: str | None, progress: Tell, say: Say
) -> StreamReport:
    """Zeros in tensors of the same shapes."""
    target = _only(config.targets())
    source = Source.open(folder, with_buffers=data is not None)
    pruner = StreamedPruner(source, config)
    with side_folder(output, replaces=WEIGHTS_FILES) as side:
        result = Result(source, side, pruner)
        way = _blocks if pruner.visits else _weights
        storing = 0 if sparse is None else of_storing(source)

        def tell(bound: Bound) -> Bound:
            bound = replace(bound, storing=storing)
            say(str(bound))
            return bound

        bound = way(result, pruner, target, data, progress, tell)
        result.copy_the_rest()
        block = build_block(source.model, config, MaskSet({}), target)
        block["sparsity"] = dict(sorted(result.records.items()))
        result.finish(source.config | {BLOCK: block})
        if sparse is not None:
            store(side, side, sparse=True)
    units = pruner.total_units
    return StreamReport(output, result.gone / units, units, result.gone, bound, block["sparsity"])


def _removed(
    folder: Path, output: Path, config: PruningConfig, data: Any, sparse: str | None, progress: Tell, say: Say
) -> StreamReport:
    """Smaller tensors of a stock model."""
    if sparse is not None:
        raise ConfigError("sparse: what is removed leaves no zeros to store; leave it out")
    source = Source.open(folder)
    pruner = StreamedUnits(source, config)
    target = _only(pruner.targets())
    bound = bound_of(pruner)
    say(str(bound))
    progress("scoring", 0, 1)
    choice = cut(pruner, target)
    with side_folder(output, replaces=WEIGHTS_FILES) as side:
        result = lay_out(pruner, side)
        write(pruner, result, progress)
        result.copy_the_rest()
        result.finish(config_values(source))
    return StreamReport(output, choice.reached, pruner.total_units, pruner.gone_units(), bound, note=choice.note)


def _check(folder: Path, output: Path, config: PruningConfig, sparse: str | None) -> None:
    if output.resolve() == folder.resolve():
        raise CheckpointError(f"'{output}' is the folder that is read; give another one to write to")
    if output.is_file():
        raise CheckpointError(f"'{output}' is a file, not a folder")
    if sparse not in (None, "bitmask"):
        raise ConfigError(f"sparse: {sparse!r} is no way of storing; known: bitmask")
    if config.strategy is not None:
        raise ConfigError("pruning.strategy: fine-tuning between steps needs the whole model; leave the strategy out")
    if config.schedule.every is not None:
        raise ConfigError("pruning.schedule.every: streaming trains nothing; leave it out")


def _only(targets: list[float]) -> float:
    """The target, where there is one."""
    if len(targets) > 1:
        raise ConfigError("pruning.schedule: steps without fine-tuning between them have no use; give one_shot")
    return targets[0]


def _silent(words: str, done: int, total: int) -> None:
    pass


def _weights(result: Result, pruner: StreamedPruner, target: float, data: Any, progress: Tell, tell: Hear) -> Bound:
    """Masks by the weights alone."""
    pointwise = pruner.criterion.pointwise and pruner.shape.kind == "weight"
    bound = tell(of_weights(result.source, pruner.weights, POINTWISE if pointwise else WHOLE))
    progress("scoring", 0, len(pruner.weights))
    for done, (name, kept) in enumerate(pruner.in_turn(target), 1):
        result.put_masked(name, result.source.read(name).masked_fill(kept.logical_not_(), 0.0))
        progress(f"pruned {name}", done, len(pruner.weights))
    return bound


def _blocks(result: Result, pruner: StreamedPruner, target: float, data: Any, progress: Tell, tell: Hear) -> Bound:
    """Masks by what the layers see, one block after another."""
    found: list[Bound] = []
    name, goals = pruner.config.criterion_name, pruner.counts.goals(target, NOTHING)
    kind = partial(StreamedVisit, result=result, tell=lambda bound: found.append(tell(bound)))
    with Unchanged() as originals:
        visit(pruner.criterion, name, pruner.model, pruner.weights, goals, NOTHING, data, originals, kind=kind)
    return found[0]
