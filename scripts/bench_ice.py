"""ICE-Pruning against pruning and fine-tuning in every step: the same network, ratio and criterion, in one run.

python scripts/bench_ice.py --data FOLDER [--images 20000] [--blocks 3] [--ratio 0.5] [--only "ICE, tuned" ...]

Trains a ResNet of a quarter of the usual width on the first images of CIFAR-10 (a folder with the parquet files of
uoft-cs/cifar10), prunes it block by block in every way that the table names, each time from the same weights, and
prints the seconds (search, probe and measuring included; the processor's beside them, for a machine that does other
things too) and the accuracy on test images. One thread, no GPU. With --results a run goes on where another one ended,
and ways of other settings (--trigger, --freeze, --trials) are added to it.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet
import timm
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import TrainingArguments

from hfprune import PruningTrainer

SAME = ("images", "tests", "blocks", "recovery", "ratio", "criterion", "rate", "dense")
"""The options that a result is of, beside its strategy."""
OFF = {"trigger": False, "freeze": False, "rate": False}


class Pictures(torch.utils.data.Dataset):
    """CIFAR-10's first so many pictures, in memory."""

    def __init__(self, path: Path, rows: int):
        table = pyarrow.parquet.read_table(path).slice(0, rows)
        pictures = [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in table.column(0).to_pylist()]
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
        mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ([0.491, 0.482, 0.447], [0.247, 0.243, 0.262]))
        self.pixels = (pixels - mean) / deviation
        self.labels = torch.tensor(table.column(1).to_pylist())

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.pixels[index], "labels": self.labels[index]}


def network(blocks: int) -> nn.Module:
    """A ResNet of four stages of so many basic blocks, of a quarter of the usual width."""
    return timm.create_model("resnet18", layers=[blocks] * 4, channels=[16, 32, 64, 128], num_classes=10)


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


class Run(NamedTuple):
    """What a way took, and where it ended."""

    seconds: float
    processor: float
    dense: float
    accuracy: float
    fine_tuned: int
    steps: int
    search: float


def train(model: nn.Module, data: tuple[Pictures, Pictures], rate: float, epochs: float, **more: Any) -> PruningTrainer:
    """Trains with a falling rate, or prunes."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            learning_rate=rate,
            seed=0,
            optim="sgd",
            optim_args="momentum=0.9",
            weight_decay=5e-4,
            lr_scheduler_type="cosine",
            per_device_train_batch_size=128,
            per_device_eval_batch_size=500,
            metric_for_best_model="accuracy",
            save_strategy="no",
            eval_strategy="no",
            logging_strategy="no",
            report_to="none",
            use_cpu=True,
        )
        trainer = PruningTrainer(
            model, arguments, train_dataset=data[0], eval_dataset=data[1], compute_metrics=accuracy, **more
        )
        trainer.train()
        return trainer


def prune(dense: nn.Module, data: tuple[Pictures, Pictures], options: argparse.Namespace, strategy: dict) -> Run:
    """One way of pruning, from the dense weights."""
    pruning = {
        "criterion": options.criterion,
        "granularity": "channel",
        "ignore": ["conv1", "*.bn2"],  # the stem and the residual streams: the channels inside the blocks go
        "target": {"ratio": options.ratio},
        "round_to": 1,
        "strategy": strategy,
        "recovery": {"epochs": options.recovery},
    }
    began, used = time.perf_counter(), time.process_time()
    trainer = train(copy.deepcopy(dense), data, options.rate, 1, pruning=pruning)
    seconds, processor = time.perf_counter() - began, time.process_time() - used
    report = trainer.course.report()
    ended = trainer.steps[-1].metric["accuracy"]
    counts = report["fine_tuned"], report["steps"]
    return Run(seconds, processor, report["dense"], ended, *counts, report.get("tuning_seconds", 0.0))


def ways(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The strategies compared; the first one is what the others are compared with."""
    rate = {"base": options.rate}
    ice = {"trigger": options.trigger, "freeze": options.freeze, "rate": rate}
    tune = {"trials": options.trials, "sample": options.sample, "bound": options.trigger}
    return {
        "fine-tuned after every step": OFF,
        "ICE": ice,
        "ICE, tuned": ice | {"tune": tune},
        "ICE without the trigger": ice | {"trigger": False},
        "ICE without freezing": ice | {"freeze": False},
        "ICE without the rate": ice | {"rate": False},
        "the trigger alone": OFF | {"trigger": options.trigger},
        "the trigger alone, tuned": OFF | {"trigger": options.trigger, "tune": tune},
        "freezing alone": OFF | {"freeze": options.freeze},
        "the rate alone": OFF | {"rate": rate},
    }


def table(found: dict[str, Run]) -> Table:
    """All ways beside the first one."""
    first = next(iter(found.values()))
    shown = Table(title=f"{first.steps} blocks, dense accuracy {first.dense:.2%}", title_justify="left")
    for column in (
        "",
        "seconds",
        "faster",
        "processor s",
        "faster",
        "of it search",
        "fine-tuned",
        "accuracy",
        "points",
    ):
        shown.add_column(column, justify="right" if column else "left")
    for name, run in found.items():
        shown.add_row(
            name,
            f"{run.seconds:.1f}",
            f"{first.seconds / run.seconds:.2f}x",
            f"{run.processor:.1f}",
            f"{first.processor / run.processor:.2f}x",
            f"{run.search:.1f}" if run.search else "",
            f"{run.fine_tuned} of {run.steps}",
            f"{run.accuracy:.2%}",
            f"{100 * (run.accuracy - first.accuracy):+.2f}",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of CIFAR-10's parquet files")
    parser.add_argument("--images", type=int, default=20_000, help="to train on")
    parser.add_argument("--tests", type=int, default=2_000, help="to measure on")
    parser.add_argument("--blocks", type=int, default=3, help="in each of four stages")
    parser.add_argument("--epochs", type=int, default=12, help="of training the dense network")
    parser.add_argument("--recovery", type=float, default=1, help="epochs of fine-tuning a step")
    parser.add_argument("--ratio", type=float, default=0.5, help="of the channels inside the blocks that goes")
    parser.add_argument("--criterion", default="l1")
    parser.add_argument("--rate", type=float, default=5e-3, help="the learning rate of fine-tuning")
    parser.add_argument("--trigger", type=float, default=1.5, help="in points; also the bound of the search")
    parser.add_argument("--freeze", type=float, default=0.5)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--sample", type=float, default=0.02)
    parser.add_argument("--only", nargs="*", help="the names of the ways, beside the first one")
    parser.add_argument("--dense", type=Path, help="a file of the dense weights: read if it is there, else written")
    parser.add_argument("--results", type=Path, help="a file of what was measured: read if it is there, and written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    train_file, test_file = (next(options.data.glob(f"{part}-*.parquet")) for part in ("train", "test"))
    data = Pictures(train_file, options.images), Pictures(test_file, options.tests)
    torch.manual_seed(0)
    dense = network(options.blocks)
    if options.dense is not None and options.dense.is_file():
        load_model(dense, options.dense)
    else:
        train(dense, data, 5e-2, options.epochs)
        if options.dense is not None:
            save_model(dense, str(options.dense))
    known = json.loads(options.results.read_text()) if options.results and options.results.is_file() else {}
    found: dict[str, Run] = {}
    for name, strategy in ways(options).items():
        if not found or not options.only or name in options.only:
            key = json.dumps([strategy, *(str(getattr(options, part)) for part in SAME)])
            if key not in known:
                known[key] = prune(dense, data, options, strategy)
                if options.results is not None:
                    options.results.write_text(json.dumps(known, indent=1))
            found[name] = Run(*known[key])
            print(name, found[name], flush=True)
    Console(width=140).print(table(found))


if __name__ == "__main__":
    main()
