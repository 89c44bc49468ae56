"""ICE-Pruning against pruning and fine-tuning in every step: the same network, ratio and criterion, in one run.

python scripts/bench_ice.py [--data FOLDER] [--blocks 3] [--images 20000] [--ratio 0.5] [--seeds 1]

Trains a small ResNet on part of CIFAR-10 (parquet files as on the Hub, uoft-cs/cifar10), prunes it block by block in
every way that the table names, each time from the same weights, and prints wall time (searching, probing and measuring
included) and accuracy on the test images. Two or three threads; no GPU.
"""

from __future__ import annotations

import argparse
import copy
import io
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import timm
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import TrainingArguments

from hfprune import PruningTrainer

OFF = {"trigger": False, "freeze": False, "rate": False}


class Pictures(torch.utils.data.Dataset):
    """CIFAR-10's pictures, in memory; `shifts` moves and mirrors them at random."""

    def __init__(self, path: Path, rows: int, shifts: bool):
        table = pyarrow.parquet.read_table(path).slice(0, rows)
        pictures = [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in table.column(0).to_pylist()]
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
        mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ([0.491, 0.482, 0.447], [0.247, 0.243, 0.262]))
        self.pixels = (pixels - mean) / deviation
        self.labels = torch.tensor(table.column(1).to_pylist())
        self.shifts = shifts

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self.pixels[index]
        if self.shifts:
            down, right = torch.randint(0, 9, (2,)).tolist()
            pixels = nn.functional.pad(pixels, (4, 4, 4, 4))[:, down : down + 32, right : right + 32]
            pixels = pixels.flip(-1) if torch.rand(()) < 0.5 else pixels
        return {"x": pixels, "labels": self.labels[index]}


def network(blocks: int) -> nn.Module:
    """A ResNet of four stages of so many basic blocks, of a quarter of the usual width."""
    return timm.create_model("resnet18", layers=[blocks] * 4, channels=[16, 32, 64, 128], num_classes=10)


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def train(
    model: nn.Module, data: tuple[Pictures, Pictures], seed: int, rate: float, epochs: float, **more: Any
) -> tuple[PruningTrainer, float]:
    """Trains with a falling rate, or prunes; returns the trainer and the seconds that it took."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            learning_rate=rate,
            seed=seed,
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
            disable_tqdm=False,
        )
        trainer = PruningTrainer(
            model, arguments, train_dataset=data[0], eval_dataset=data[1], compute_metrics=accuracy, **more
        )
        began = time.perf_counter()
        trainer.train()
        return trainer, time.perf_counter() - began


def ways(rate: float, tune: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The strategies compared; the first one is what the others are compared with."""
    ice = {"trigger": 1.5, "freeze": 0.5, "rate": {"base": rate}}
    return {
        "fine-tuned after every step": OFF,
        "ICE": ice,
        "ICE, tuned": ice | {"tune": tune},
        "ICE without the trigger": ice | {"trigger": False},
        "ICE without freezing": ice | {"freeze": False},
        "ICE without the rate": ice | {"rate": False},
        "the trigger alone": OFF | {"trigger": 1.5},
        "freezing alone": OFF | {"freeze": 0.5},
        "the rate alone": OFF | {"rate": {"base": rate}},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="/work/shared/data/cifar10-jpeg", type=Path)
    parser.add_argument("--blocks", type=int, default=3, help="in each of four stages")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--tests", type=int, default=5_000)
    parser.add_argument("--epochs", type=int, default=15, help="of training the dense network")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--rate", type=float, default=5e-3, help="of fine-tuning")
    parser.add_argument("--criterion", default="l1")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--sample", type=float, default=0.02)
    parser.add_argument("--only", nargs="*", help="parts of the names of the ways to run")
    parser.add_argument("--dense", type=Path, help="keep the dense network there, and take it from there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = (
        Pictures(options.data / "train-00000-of-00001.parquet", options.images, shifts=True),
        Pictures(options.data / "test-00000-of-00001.parquet", options.tests, shifts=False),
    )
    torch.manual_seed(0)
    dense = network(options.blocks)
    if options.dense is not None and options.dense.is_file():
        from safetensors.torch import load_model

        load_model(dense, options.dense)
    else:
        _, seconds = train(dense, data, 0, 5e-2, options.epochs)
        print(f"dense: {seconds:.0f} s", file=sys.stderr)
        if options.dense is not None:
            from safetensors.torch import save_model

            save_model(dense, str(options.dense))
    tune = {"trials": options.trials, "sample": options.sample, "bound": 1.5}
    found = {}
    for name, strategy in ways(options.rate, tune).items():
        if options.only and not any(part in name for part in options.only):
            continue
        trainer, seconds = train(
            copy.deepcopy(dense), data, 0, options.rate, 1,
            pruning={"criterion": options.criterion, "granularity": "channel", "target": {"ratio": options.ratio},
                     "strategy": strategy, "round_to": 1},
        )  # fmt: skip
        found[name] = (trainer, seconds)
        print(
            f"{name}: {seconds:.1f} s, {trainer.steps[-1].metric['accuracy']:.4f}, "
            f"dense {trainer.course.found['dense']:.4f}, fine-tuned {trainer.course.report()['fine_tuned']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
