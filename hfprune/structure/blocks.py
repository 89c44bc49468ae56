"""Whole residual blocks: found in the graph, scored, and taken out of their container."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx import Node

from hfprune.criteria.calibration.running import Calibration, Progress, accumulate
from hfprune.criteria.criterion import Criterion
from hfprune.errors import ConfigError, ModelError
from hfprune.profiling import FORWARD_FAILURES
from hfprune.structure.graph import evaluating, module_paths, operation
from hfprune.structure.groups import Structure
from hfprune.structure.identities import Value
from hfprune.structure.proof import compare, reference
from hfprune.structure.surgery import Journal
from hfprune.weights import Weight, scorable

_PASSED = (
    "add",
    "layer_norm",
    "rms_norm",
    "dropout",
    "clone",
    "contiguous",
    "to",
    "_to_copy",
    "alias",
    "view",
    "reshape",
)
_ACTIVATIONS = ("relu", "gelu", "silu", "hardtanh", "hardswish", "clamp")
_INDEX_NAMES = ("layer_idx", "layer_index", "layer_id")


@dataclass(frozen=True)
class ResidualBlock:
    """An element of a ModuleList or Sequential that adds to its input, so that the model runs without it.

    Attributes:
        path: its dotted path.
        entry, exit: the steps whose results it takes and gives.
    """

    path: str
    entry: Node
    exit: Node

    @property
    def container(self) -> str:
        """The path of the list that it stands in."""
        return self.path.rpartition(".")[0]

    def weights(self, model: nn.Module) -> dict[str, Weight]:
        """Its parameters of two dimensions or more, for scoring."""
        block = model.get_submodule(self.path)
        return {
            f"{self.path}.{name}": Weight(f"{self.path}.{name}", parameter, parameter.ndim - 1)
            for name, parameter in block.named_parameters()
            if parameter.ndim > 1
        }


def find_blocks(structure: Structure, droppable: bool = True) -> list[ResidualBlock]:
    """The residual blocks of a model: their result is their input plus something, of the same shape.

    Args:
        structure: of the model.
        droppable: only those without which the model runs; otherwise also those that end in a sum of two ways from
            their input, as with an activation after the sum or a convolution in the shortcut.
    """
    found = []
    kinds = (_residual,) if droppable else (_residual, _joined)
    for path, module in structure.model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            found += [
                block
                for name, _ in module.named_children()
                for block in [_first(kind(structure, f"{path}.{name}" if path else name) for kind in kinds)]
                if block is not None
            ]
    # Of blocks inside blocks the outer ones are units where their list holds little else, as a decoder's layers do;
    # a stage among others that are no blocks gives way to the blocks inside it.
    in_list = Counter(block.container for block in found)
    whole = {c for c, count in in_list.items() if 2 * count >= len(structure.model.get_submodule(c))}
    outer = [block.path for block in found if block.container in whole]
    found = [block for block in found if not any(block.path.startswith(f"{path}.") for path in outer)]
    paths = [block.path for block in found]
    return [
        block
        for block in found
        if block.container in whole or not any(path.startswith(f"{block.path}.") for path in paths)
    ]


def score_blocks(
    structure: Structure,
    blocks: list[ResidualBlock],
    criterion: Criterion,
    statistics: dict[str, Any],
    data: Any = None,
    progress: Progress | None = None,
    values: Mapping[str, torch.Tensor] | None = None,
) -> list[float]:
    """One score a block; the lowest go first. Criteria of weights: the mean of their terms over the block's weights,
    whose values are the model's own unless `values` has them."""
    if criterion.of_blocks:
        return _influence(structure.model, blocks, criterion, data, progress) if blocks else []
    scores = []
    for block in blocks:
        total, count = torch.zeros((), dtype=torch.float64), 0
        for name, weight in block.weights(structure.model).items():
            if name not in statistics:  # it took no part in any calibration batch
                continue
            value = weight.parameter if values is None else values[name]
            terms = criterion.terms(name, scorable(value.detach()), *statistics[name])
            total, count = total + terms.double().sum().cpu(), count + terms.numel()
        scores.append(float(criterion.finish(total / max(1, count))))
        if not count or not math.isfinite(scores[-1]):
            what = "gave a score that is not finite in" if count else "can't score what took no part in any batch:"
            raise ModelError(f"pruning.criterion: '{criterion.name}' {what} '{block.path}'")
    return scores


def drop_blocks(structure: Structure, paths: list[str]) -> tuple[Journal, dict[str, tuple[Any, Any]]]:
    """Takes blocks out of their containers, the rest closing ranks, and proves it; or changes nothing.

    Returns:
        What takes it back, and the config's values that changed, before and after.

    Raises:
        ModelError: the model without them does not run, or is not what it was with these blocks passed over.
    """
    blocks = {block.path: block for block in find_blocks(structure)}
    for path in paths:
        if path not in blocks:
            raise ModelError(f"'{path}' is no residual block of the model")
    expected = reference(
        structure, np.zeros(len(structure.labels), bool), {blocks[p].exit: blocks[p].entry for p in paths}
    )
    journal = Journal()
    with evaluating(structure.model):
        try:
            containers = {path.rpartition(".")[0] for path in paths}
            found = {container: structure.model.get_submodule(container) for container in sorted(containers)}
            for container, module in found.items():  # looked up before any of them closes ranks
                _close_ranks(module, container, set(paths), journal)
            changes = _set_counts(structure.model, paths, journal)
            compare(structure, expected)
        except FORWARD_FAILURES as error:
            journal.rollback()
            raise ModelError(f"the blocks were put back: {str(error).strip().splitlines()[0]}") from error
        except BaseException:
            journal.rollback()
            raise
    return journal, changes


def _first(found: Iterable[ResidualBlock | None]) -> ResidualBlock | None:
    return next((block for block in found if block is not None), None)


def _exit(structure: Structure, path: str) -> tuple[set[Node], Node | None]:
    """The steps of a module, and the only one whose result is used outside; None where there are several."""
    inside = [n for n in structure.graph.nodes if n.op == "call_function" and path in module_paths(n)]
    own = set(inside)
    exits = [
        n
        for n in inside
        if any(user not in own for user in n.users) and isinstance(structure.walk.values.get(n), Value)
    ]
    return own, exits[0] if len(exits) == 1 else None


def _joined(structure: Structure, path: str) -> ResidualBlock | None:
    """A block that ends in a sum of two ways from its input, with no other such sum on them."""
    own, end = _exit(structure, path)
    join = end
    while join in own and not _is_sum(structure, join):
        ways = [arg for arg in join.all_input_nodes if not _is_own(structure, arg)]
        join = ways[0] if len(ways) == 1 and operation(join) in (*_PASSED, *_ACTIVATIONS) else None
    if join not in own:
        return None
    entries: list[Node] = []
    for way in join.all_input_nodes:
        seen, open_nodes = set(), [way]
        while open_nodes and len(entries) < 2:
            node = open_nodes.pop()
            if node not in own and not _is_own(structure, node):
                entries.append(node)
                break
            if node not in seen and node in own and not _is_sum(structure, node):
                seen.add(node)
                open_nodes += node.all_input_nodes
    return ResidualBlock(path, entries[0], end) if len(entries) == 2 and entries[0] is entries[1] else None


def _is_sum(structure: Structure, node: Node) -> bool:
    """Whether it adds two activations."""
    ways = [arg for arg in node.all_input_nodes if not _is_own(structure, arg)]
    return operation(node) == "add" and len(ways) == 2


def _residual(structure: Structure, path: str) -> ResidualBlock | None:
    own, end = _exit(structure, path)
    if end is None:
        return None
    seen, open_nodes = set(), [end]
    shape = structure.walk.values[end].shape
    while open_nodes:
        node = open_nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if node not in own:
            value = structure.walk.values.get(node)
            if isinstance(value, Value) and value.shape == shape and node.op == "call_function":
                return ResidualBlock(path, node, end)
            continue
        if operation(node) in _PASSED:
            open_nodes += [arg for arg in node.all_input_nodes if not _is_own(structure, arg)]
    return None


def _is_own(structure: Structure, node: Node) -> bool:
    value = structure.walk.values.get(node)
    return isinstance(value, Value) and value.is_parameter


def _close_ranks(container: nn.Module, path: str, dropped: set[str], journal: Journal) -> None:
    before = dict(container._modules)
    kept = [module for name, module in before.items() if f"{path}.{name}" not in dropped]
    if not kept:
        raise ModelError(f"nothing would be left of '{path}'")

    def put(modules: dict[str, nn.Module]) -> None:
        container._modules.clear()
        container._modules.update(modules)

    journal.add(lambda: put(before))
    names = list(before)
    numbered = all(name.isdigit() for name in names)
    rest = [name for name in names if f"{path}.{name}" not in dropped]
    put(dict(zip((str(i) for i in range(len(kept))) if numbered else rest, kept, strict=True)))
    for new, old in enumerate(rest):
        for module in before[old].modules():
            for attribute in _INDEX_NAMES:
                if numbered and getattr(module, attribute, None) == int(old):
                    journal.set_attribute(module, attribute, new)


def _set_counts(model: nn.Module, paths: list[str], journal: Journal) -> dict[str, tuple[Any, Any]]:
    """Sets what a transformers config says about layers: their number, and lists with an entry a layer.

    Returns:
        Config key to its value before and after.
    """
    changes: dict[str, tuple[Any, Any]] = {}
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict") or hasattr(config, "stage_names"):  # a backbone's config names every layer
        return changes
    for container in dict.fromkeys(path.rpartition(".")[0] for path in paths):
        leaves = [path.rpartition(".")[2] for path in paths if path.rpartition(".")[0] == container]
        gone = {int(leaf) for leaf in leaves if leaf.isdigit()}
        total = len(model.get_submodule(container)) + len(gone)
        side = next((s for s in ("encoder", "decoder") if s in container), "")
        keys = [key for key in vars(config) if re.search(r"layers?$|depth$|layer_types", key)]
        of_side = [key for key in keys if side and side in key]
        for key in of_side or [key for key in keys if "encoder" not in key and "decoder" not in key]:
            value = getattr(config, key)
            if type(value) is int and value == total:
                changes[key] = value, total - len(gone)
            elif isinstance(value, list) and len(value) == total > 1:
                changes[key] = value, [item for index, item in enumerate(value) if index not in gone]
    for key, (_, value) in changes.items():
        journal.set_attribute(config, key, value)
    return changes


def _influence(
    model: nn.Module, blocks: list[ResidualBlock], criterion: Criterion, data: Any, progress: Progress | None
) -> list[float]:
    """1 - cos(hidden in, hidden out), averaged over positions, batches and processes (ShortGPT, arXiv 2403.03853)."""
    if data is None:
        raise ConfigError("pruning.criterion: 'block_influence' looks at activations and needs data")
    weights = {name: weight for block in blocks for name, weight in block.weights(model).items()}
    calibration = Calibration(model, weights, data, criterion.batches, progress=progress)
    sums = torch.zeros(len(blocks), 2, dtype=torch.float64, device=calibration.device)

    def watch(index: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            before = args[0] if args else next(iter(kwargs.values()))
            after = output[0] if isinstance(output, tuple) else output
            dim = 1 if before.ndim == 4 else -1
            cos = nn.functional.cosine_similarity(before.float(), after.float(), dim=dim)
            sums[index, 0] += (1 - cos).double().sum()
            sums[index, 1] += cos.numel()

        return hook

    def add(batch: Any, number: int) -> int:
        calibration.forward(batch)
        return 1

    hooks = [
        model.get_submodule(block.path).register_forward_hook(watch(i), with_kwargs=True)
        for i, block in enumerate(blocks)
    ]
    try:
        with evaluating(model), torch.no_grad():
            accumulate(calibration, "influence of blocks", add, [sums])
    finally:
        for hook in hooks:
            hook.remove()
    for block, (total, count) in zip(blocks, sums.tolist(), strict=True):
        if not count or not math.isfinite(total):
            what = "gave a score that is not finite in" if count else "can't score what took no part in any batch:"
            raise ModelError(f"pruning.criterion: 'block_influence' {what} '{block.path}'")
    return [total / count for total, count in sums.tolist()]
