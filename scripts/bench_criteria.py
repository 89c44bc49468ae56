"""Speed of structural scores beside Torch-Pruning's importance of the same name, on the same ResNet-50 and ViT-B/16.

    python scripts/bench_criteria.py [--runs 5] [--images 2] [--only resnet50]

Torch-Pruning must be installed (`pip install torch-pruning`); without it the script prints hfprune's seconds alone.
Groups are found beforehand by each for itself. What is timed is all that a score takes from there: for criteria with
data the forward and backward passes on one batch of images too. Runs alternate; the table holds medians, and the exit
code is 1 where hfprune is slower.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from hfprune.criteria import create
from hfprune.criteria.calibration import gather
from hfprune.structure.groups import CoupledGroup, analyse
from hfprune.structure.scores import score_groups, scored_weights

MODELS = {"resnet50": "ResNet-50", "vit_base_patch16_224": "ViT-B/16"}
WITH_DATA = ("taylor", "fisher")
NAMES = ("random", "l1", "l2", "lamp", "bn_scale", "fpgm", *WITH_DATA)
TOLERATED = 1.05
"""Two medians that differ by less are the same on a shared machine."""

Batch = tuple[torch.Tensor, torch.Tensor]


def own_score(model: nn.Module, groups: list[CoupledGroup], name: str, batch: Batch) -> None:
    """hfprune: statistics, then the scores of all groups."""
    criterion = create(name)
    statistics = gather(criterion, model, scored_weights(model, groups, criterion), batch, partial=True)
    score_groups(model, groups, criterion, statistics)


def peer_score(model: nn.Module, groups: list[Any], name: str, batch: Batch) -> None:
    """Torch-Pruning: gradients as its documentation has them, then the importance of all groups."""
    from torch_pruning.pruner import importance

    makers: dict[str, Callable[[], Any]] = {
        "random": importance.RandomImportance,
        "l1": lambda: importance.GroupMagnitudeImportance(p=1),
        "l2": lambda: importance.GroupMagnitudeImportance(p=2),
        "lamp": importance.LAMPImportance,
        "bn_scale": importance.BNScaleImportance,
        "fpgm": importance.FPGMImportance,
        "taylor": importance.GroupTaylorImportance,
        "fisher": importance.GroupHessianImportance,
    }
    scorer = makers[name]()
    model.zero_grad()
    if name == "taylor":
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    elif name == "fisher":
        for loss in nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none"):
            model.zero_grad()
            loss.backward(retain_graph=True)
            scorer.accumulate_grad(model)
    for group in groups:
        scorer(group)


def peer_groups(model: nn.Module) -> list[Any]:
    """All groups that Torch-Pruning finds, the classifier's aside."""
    import torch_pruning

    graph = torch_pruning.DependencyGraph().build_dependency(model, torch.randn(1, 3, 224, 224))
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    return list(graph.get_all_groups(ignored_layers=last))


def seconds(act: Callable[[], None]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def rows(name: str, runs: int, images: int, with_peer: bool) -> list[tuple[str, float, float | None]]:
    """Criterion, median seconds of hfprune and of Torch-Pruning, on one model."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    batch = (torch.randn(images, 3, 224, 224), torch.randint(1000, (images,)))
    own = list(analyse(model, batch[0][:1]).groups.values())
    peers = peer_groups(model) if with_peer else []
    found = []
    for criterion in NAMES:
        if criterion == "bn_scale" and name != "resnet50":  # ViT's heads and neurons have no norm of their own
            continue
        acts = [lambda c=criterion: own_score(model, own, c, batch)]
        if with_peer:
            acts.append(lambda c=criterion: peer_score(model, peers, c, batch))
        times: list[list[float]] = [[] for _ in acts]
        for run in range(runs + 1):
            for act, taken in zip(acts, times, strict=True):
                elapsed = seconds(act)
                if run:  # the first run warms up
                    taken.append(elapsed)
        medians = [statistics.median(taken) for taken in times]
        found.append((criterion, medians[0], medians[1] if with_peer else None))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="runs whose median counts")
    parser.add_argument("--images", type=int, default=2, help="images in the batch of criteria with data")
    parser.add_argument("--only", choices=sorted(MODELS), help="one model")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with_peer = find_spec("torch_pruning") is not None
    table = Table(title="Scoring all groups of a model", title_justify="left")
    for column in ("model", "criterion", "hfprune", "Torch-Pruning", "ratio"):
        table.add_column(column, justify="left" if column in ("model", "criterion") else "right")
    slower = []
    for name in [options.only] if options.only else MODELS:
        for criterion, own, peer in rows(name, options.runs, options.images, with_peer):
            beside = ("", "") if peer is None else (f"{peer * 1e3:,.1f} ms", f"{peer / own:.2f}x faster")
            table.add_row(MODELS[name], criterion, f"{own * 1e3:,.1f} ms", *beside)
            if peer is not None and own > peer * TOLERATED:
                slower.append(f"{criterion} on {MODELS[name]}")
    console = Console(width=120)
    console.print(table)
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads, {platform.machine()}; "
                  f"median of {options.runs} runs")  # fmt: skip
    console.print(f"slower: {', '.join(slower)}" if slower else "slower: none" if with_peer else "no peer installed")
    return int(bool(slower))


if __name__ == "__main__":
    sys.exit(main())
