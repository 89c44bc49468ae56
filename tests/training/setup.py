"""A small real task for the trainer: handwritten digits and a tiny vision transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import TrainingArguments, ViTForImageClassification

from hfprune import PruningTrainer
from tests.support.models import vit


class Digits(torch.utils.data.Dataset):
    """Rows of the digits data, as Trainer wants them."""

    def __init__(self, start: int, stop: int):
        digits = load_digits()
        self.images = torch.tensor(digits.images[start:stop, None] / 8 - 1, dtype=torch.float32)
        self.labels = torch.tensor(digits.target[start:stop])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def tiny_vit(dropout: float = 0.1) -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 48}
    return vit(**sizes, num_channels=1, num_labels=10, hidden_dropout_prob=dropout)


class PlainNet(nn.Module):
    """A user's own module: inputs in, logits out, batch norm inside."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.conv(x)))
        return self.fc(torch.nn.functional.avg_pool2d(hidden, 2).flatten(1))


def accuracy(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions
    return {"accuracy": float(np.mean(logits.argmax(-1) == prediction.label_ids))}


def make_trainer(folder: Path, model: nn.Module | None = None, **options: Any) -> PruningTrainer:
    """A trainer over 128 digits; `pruning` replaces parts of a two-phase default, other options go to the arguments."""
    schedule, recovery = {"kind": "constant", "steps": 2}, {"epochs": 2}
    pruning = {"criterion": "l1", "target": 0.8, "schedule": schedule, "recovery": recovery}
    pruning |= options.pop("pruning", {})
    own = ("optimizers", "callbacks", "train_dataset", "eval_dataset")
    more = {key: options.pop(key) for key in own if key in options}
    arguments = {
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "learning_rate": 3e-3,
        "use_cpu": True,
        "save_strategy": "epoch",
        "logging_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 1,
    }
    data = {"train_dataset": Digits(0, 128), "eval_dataset": Digits(1000, 1100)}
    return PruningTrainer(
        model=model if model is not None else tiny_vit(),
        args=TrainingArguments(str(folder), **arguments | options),
        compute_metrics=accuracy,
        pruning=pruning,
        **data | more,
    )
