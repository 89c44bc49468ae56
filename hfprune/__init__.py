"""hfprune: prune Hugging Face, timm and PyTorch models, and load the result with from_pretrained."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "PruningConfig": "hfprune.config",
    "PruningTrainer": "hfprune.training",
    "Recipe": "hfprune.recipe",
    "HfpruneError": "hfprune.errors",
    "prune": "hfprune.oneshot",
    "measure": "hfprune.profiling",
    "register_criterion": "hfprune.criteria",
    "save_pretrained": "hfprune.checkpoint",
    "from_pretrained": "hfprune.checkpoint",
    "verify": "hfprune.checkpoint",
    "run": "hfprune.pipeline",
}
_MODULES = ("schedules", "config", "criteria", "profiling", "checkpoint", "training", "pipeline")

__all__ = [*_PUBLIC, "schedules"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"hfprune.{name}")
    raise AttributeError(f"module 'hfprune' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, *_MODULES})
