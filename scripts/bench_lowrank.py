"""A family of low-rank models from one run, beside models made one by one: `python scripts/bench_lowrank.py`.

Trains the small Llama of recipes/llama_text_lowrank.yaml (or takes one that was trained: --dense FOLDER), then

- family: the recipe's run, one checkpoint a size, fine-tuned for an epoch after every step;
- one size: the smallest of these sizes alone, in one step, fine-tuned for as many epochs as the family in all;
- one-shot SVD: every size by itself, the components ranked by their singular values, without fine-tuning and with an
  epoch of it; and by activation-aware whitening without fine-tuning.

Perplexity is that of the recipe's evaluation texts; CPU time that of this process, scoring, saving and evaluating
included. Latency: medians in turns, and in how many times the dense model's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import hfprune
from hfprune.pipeline import prepare_run
from hfprune.recipe import Recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "llama_text_lowrank.yaml"
BATCHES = (1, 32)


def recipe_of(folder: Path, dense: Path | None = None, **pruning: Any) -> Recipe:
    """The recipe with another model, folder and pruning; None takes a key out."""
    values = Recipe.from_yaml(RECIPE).model_dump(mode="json", exclude_unset=True)
    values["output"]["folder"] = str(folder)
    values["training"] |= {"save_strategy": "no", "disable_tqdm": True}
    if dense is not None:
        values["model"] = {"name": str(dense)}
        del values["baseline"]
    values["pruning"] = {k: v for k, v in (values["pruning"] | pruning).items() if v is not None}
    return Recipe.parse(values)


def trained(recipe: Recipe) -> tuple[Any, float]:
    """The trainer after its run, and the CPU seconds that this took."""
    trainer = prepare_run(recipe).trainer
    began = time.process_time()
    trainer.train()
    return trainer, time.process_time() - began


def latencies(models: dict[str, torch.nn.Module], rounds: int) -> dict[str, dict[int, float]]:
    """Median milliseconds of every model by batch size, the models in turns."""
    found: dict[str, dict[int, list[float]]] = {name: {batch: [] for batch in BATCHES} for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            for batch, value in hfprune.measure(model, batch_sizes=BATCHES, repeats=5).latency_ms.items():
                found[name][batch].append(value)
    return {name: {batch: statistics.median(v) for batch, v in by.items()} for name, by in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_lowrank"))
    parser.add_argument("--dense", type=Path, help="a dense model that the recipe trained before")
    parser.add_argument("--rounds", type=int, default=5, help="of measuring latency")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console, folder, dense = Console(width=120), options.folder, options.dense
    if dense is None:
        nothing = {"criterion": "l1", "granularity": "weight", "target": 0, "export_sizes": None}
        hfprune.run(recipe_of(folder / "start", recovery={"epochs": 0}, **nothing), console=Console(quiet=True))
        dense = folder / "start" / "dense"
    family, seconds = trained(recipe_of(folder / "family", dense))
    sizes, epochs = family.pruning.export_sizes, sum(step.epochs for step in family.steps)
    alone = {"export_sizes": None, "target": {"params": sizes[-1]}, "recovery": {"epochs": epochs}}
    single, single_seconds = trained(recipe_of(folder / "single", dense, **alone))

    def perplexity(size: float, criterion: str, epochs: int) -> float:
        one = {"export_sizes": None, "target": {"params": size}, "recovery": {"epochs": epochs}}
        recipe = recipe_of(folder / "one_shot", dense, criterion=criterion, **one)
        return trained(recipe)[0].steps[-1].metric["perplexity"]

    models = {"dense": hfprune.from_pretrained(dense)}
    models |= {f"{size:g}": hfprune.from_pretrained(folder / "family" / "sizes" / f"{size:g}") for size in sizes}
    costs = {name: hfprune.measure(model, latency=False) for name, model in models.items()}
    times = latencies(models, options.rounds)
    start = prepare_run(recipe_of(folder / "one_shot", dense)).trainer.evaluate()["eval_perplexity"]
    table = Table(title="perplexity and cost of a family of sizes from one run", title_justify="left")
    headings = ("size", "parameters", "MACs", "family", "SVD", "SVD + 1 epoch", "whitening")
    for heading in (*headings, *(f"batch {batch}" for batch in BATCHES)):
        table.add_column(heading, justify="right")
    for name, cost in costs.items():
        words = [f"{start:.2f}", "", "", ""]
        if name != "dense":
            size = float(name)
            member = family.steps[sizes.index(size)].metric["perplexity"]
            others = [
                perplexity(size, *how) for how in (("singular_value", 0), ("singular_value", 1), ("whitening", 0))
            ]
            words = [f"{value:.2f}" for value in (member, *others)]
        speed = [f"{now:.1f} ms, {times['dense'][batch] / now:.2f}x" for batch, now in times[name].items()]
        table.add_row(name, f"{cost.params:,}", f"{cost.macs / 1e6:.1f} M", *words, *speed)
    console.print(table)
    console.print(
        f"CPU time: the family of {len(sizes)} {seconds:.0f} s, {sizes[-1]:g} alone with as many epochs "
        f"{single_seconds:.0f} s: {seconds / single_seconds:.2f} times\n"
        f"perplexity at {sizes[-1]:g}: {family.steps[-1].metric['perplexity']:.2f} in the family, "
        f"{single.steps[-1].metric['perplexity']:.2f} alone"
    )


if __name__ == "__main__":
    main()
