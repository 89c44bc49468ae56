"""Kills a run at random moments with SIGKILL, resumes it, and compares where it ends with a run that nobody killed.

python scripts/fault_campaign.py [--kills 200] [--seed 0] [--recipes masks removal]

Two small recipes on the embedded digits, one that holds weights at zero and one that removes heads and neurons, each
with a dense baseline, two pruning steps and patience. A third of the kills waits for files that are just being written.
Prints how many kills were survived, how many runs ended with the same weights, masks, steps and metric, how many
checkpoints were found corrupted, and the work that was lost. The exit code is 1 where a run did not go on or ended
elsewhere. Needs a system that can fork.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from hfprune import Recipe
from hfprune.checkpoint.verify import verify
from hfprune.pipeline import run
from hfprune.terminal import quiet_libraries
from hfprune.training.checkpoints.folder import SIDE, is_whole

TINY = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 10}
RECIPE = {
    "model": {"name": "timm/vit_tiny_patch16_224", "pretrained": False, "args": TINY},
    "data": {"name": "digits", "train_samples": 256, "eval_samples": 64, "augment": False},
    "baseline": {"epochs": 2},
    "training": {
        "per_device_train_batch_size": 32,
        "learning_rate": 2e-3,
        "save_strategy": "steps",
        "save_steps": 3,
        "seed": 3,
        "disable_tqdm": True,
    },
}
RECIPES: dict[str, dict[str, Any]] = {
    "masks": {
        "criterion": "taylor",
        "target": 0.7,
        "schedule": {"kind": "hybrid", "steps": 1},
        "recovery": {"epochs": 3, "patience": 1, "monitor": "accuracy"},
    },
    "removal": {
        "criterion": "taylor",
        "granularity": ["head", "neuron"],
        "target": {"macs": 0.6},
        "schedule": {"kind": "constant", "steps": 2},
        "round_to": 1,
        "recovery": {"epochs": 3, "patience": 1, "monitor": "accuracy"},
    },
}


@dataclass
class Tally:
    """What happened to one recipe."""

    kills: int = 0
    survived: int = 0
    runs: int = 0
    equal: int = 0
    corrupted: int = 0
    lost: float = 0.0
    moments: Counter = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)


def life(values: dict[str, Any], folder: Path, log: Path) -> int:
    """Runs a recipe, or goes on with it, in a process of its own; its number."""
    number = os.fork()
    if number:
        return number
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        recipe = Recipe.parse(values | {"output": {"folder": str(folder), "batch_sizes": [1]}})
        run(recipe, resume=folder.is_dir())
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def ended(number: int) -> int | None:
    """The exit code of a process, None while it runs."""
    done, status = os.waitpid(number, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def wait(number: int, until: float, folder: Path | None) -> int | None:
    """Waits for a process until a moment, or until files are being written in a folder; its exit code, if it ended."""
    before = writes(folder) if folder is not None else set()
    while (code := ended(number)) is None and time.perf_counter() < until:
        if folder is not None and (now := writes(folder)) - before:
            break
        before = now if folder is not None else before
        time.sleep(0.0005)
    return code


def until_begun(number: int, log: Path) -> None:
    """Waits until a process trains, or has ended."""
    while "up to" not in log.read_text() and not os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.005)


def writes(folder: Path) -> set[str]:
    """What a folder holds half written or half moved."""
    places = [folder, folder / "dense"]
    found = {entry.path for place in places if place.is_dir() for entry in os.scandir(place)}
    return {path for path in found if Path(path).name.startswith((SIDE, ".replaced-"))}


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights and all that is not a time."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    report = json.loads((folder / "pruning_report.json").read_text())
    steps = [{key: value for key, value in step.items() if key != "seconds"} for step in report["steps"]]
    metrics = [report[side]["metric"] for side in ("dense", "pruned")]
    return weights, {"steps": steps, "metrics": metrics, "sparsity": report["sparsity"]}


def same(found: tuple, expected: tuple) -> bool:
    weights, other = found[0], expected[0]
    alike = weights.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in weights.items())
    return alike and found[1] == expected[1]


def moment(folder: Path, log: Path, before: set[str]) -> str:
    """What a killed process was doing; `before` is what its predecessor left half done."""
    if writes(folder) - before:
        return "saving"
    lines = [line for line in log.read_text().splitlines() if line.startswith(("dense training", "phase "))]
    if not lines:
        return "starting, or at the end" if (folder / "dense" / "dense.json").is_file() else "starting"
    return "dense training" if lines[-1].startswith("dense") else "pruning and fine-tuning"


def inspect(folder: Path, tally: Tally) -> float:
    """Looks at what a kill left; when the last whole checkpoint was written."""
    written = 0.0
    for path in [*folder.glob("checkpoint-*"), *(folder / "dense").glob("checkpoint-*")]:
        if is_whole(path):
            written = max(written, path.stat().st_mtime)
        elif path.parent.is_dir():
            tally.corrupted += 1
            tally.complaints.append(f"not whole: {path}")
    if (folder / "config.json").is_file() and not verify(folder).ok:
        tally.corrupted += 1
        tally.complaints.append(f"not as recorded: {folder}")
    return written


def campaign(name: str, kills: int, chance: random.Random, place: Path, console: Console) -> Tally:
    """Kills the runs of one recipe so many times."""
    tally, values, log = Tally(), RECIPE | {"pruning": RECIPES[name]}, place / f"{name}.log"
    began = time.perf_counter()
    number = life(values, place / f"{name}-whole", log)
    _, status = os.waitpid(number, 0)
    length = time.perf_counter() - began
    if status:
        sys.exit(f"{name}: the run that nobody kills failed:\n{log.read_text()}")
    expected = outcome(place / f"{name}-whole")
    console.print(f"{name}: a run takes {length:.1f} s", highlight=False)
    folder = place / f"{name}-0"
    killed = False
    while tally.kills < kills or killed:
        last = tally.kills >= kills  # what was killed last is still to go on
        began, started, before = time.perf_counter(), time.time(), writes(folder)
        log.write_text("")
        number = life(values, folder, log)
        if not last and chance.random() < 3 / 4:  # the others may be killed before they have begun
            until_begun(number, log)
        until = time.perf_counter() + (600 if last else chance.uniform(0, length / 3))
        if not last and chance.random() < 1 / 3:  # a moment to let it get under way, then the next writing
            code = wait(number, until, None)
            code = code if code is not None else wait(number, until + length, folder)
            time.sleep(chance.uniform(0, 0.004))
        else:
            code = wait(number, until, None)
        if code is None:
            os.kill(number, signal.SIGKILL)
            _, status = os.waitpid(number, 0)
            if os.WIFSIGNALED(status):
                tally.survived += killed
                tally.kills, killed = tally.kills + 1, True
                tally.moments[moment(folder, log, before)] += 1
                tally.lost += time.time() - max(started, inspect(folder, tally))
                continue
            code = os.waitstatus_to_exitcode(status)
        if code:
            tally.complaints.append(f"run {tally.runs} did not go on: {log.read_text().strip().splitlines()[-1]}")
            folder, killed = place / f"{name}-again-{len(tally.complaints)}", False
            continue
        tally.survived += killed
        tally.runs += 1
        if same(outcome(folder), expected):
            tally.equal += 1
        else:
            tally.complaints.append(f"ended elsewhere: {folder}")
        console.print(f"{name}: {tally.kills} kills, {tally.equal} of {tally.runs} runs ended alike", highlight=False)
        folder, killed = place / f"{name}-{tally.runs}", False
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="over all recipes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipes", nargs="*", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--folder", type=Path, help="kept for a look; by default a temporary one")
    options = parser.parse_args()
    quiet_libraries()
    console, chance = Console(), random.Random(options.seed)
    table = Table(title="killed with SIGKILL and resumed", title_justify="left")
    for column in (
        "recipe",
        "kills",
        "survived",
        "runs",
        "ended alike",
        "corrupted checkpoints",
        "seconds lost a kill",
    ):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    moments, complaints, good = Counter(), [], True
    with tempfile.TemporaryDirectory() as temporary:
        place = options.folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        for name in options.recipes:
            tally = campaign(name, options.kills // len(options.recipes), chance, place, console)
            numbers = (tally.kills, tally.survived, tally.runs, tally.equal, tally.corrupted)
            table.add_row(name, *map(str, numbers), f"{tally.lost / max(1, tally.kills):.2f}")
            good &= tally.survived == tally.kills and tally.equal == tally.runs and not tally.corrupted
            moments += tally.moments
            complaints += tally.complaints
    console.print(table)
    console.print("killed while: " + ", ".join(f"{what} {n}" for what, n in moments.most_common()), highlight=False)
    for line in complaints:
        console.print(line, markup=False, highlight=False)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
