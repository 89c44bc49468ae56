"""hfprune: prune Hugging Face, timm and PyTorch models, and load the result with from_pretrained."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "PruningConfig": "hfprune.config",
    "PruningTrainer": "hfprune.training",
    "Recipe": "hfprune.recipe",
    "HfpruneError": "hfprune.errors",
    "prune": "hfprune.oneshot",
    "prune_checkpoint": "hfprune.streaming",
    "inspect": "hfprune.inspection",
    "measure": "hfprune.profiling",
    "register_criterion": "hfprune.criteria",
    "save_pretrained": "hfprune.checkpoint",
    "from_pretrained": "hfprune.checkpoint",
    "import_torch_prune": "hfprune.checkpoint",
    "verify": "hfprune.checkpoint",
    "merge": "hfprune.checkpoint",
    "write_card": "hfprune.hub.card",
    "push_to_hub": "hfprune.hub.push",
    "run": "hfprune.pipeline",
    "similarity": "hfprune.analysis",
    "sensitivity": "hfprune.analysis",
    "compare": "hfprune.analysis.strategies",
}
_MODULES = ("schedules", "config", "criteria", "profiling", "checkpoint", "training", "pipeline", "analysis", "wild")

__all__ = [*_PUBLIC, "schedules"]


_REGISTRY = "transformers.quantizers.auto"


class _WhenTransformersLoads:
    """Waits for transformers' registry of loaders and adds ours, so that importing hfprune imports neither."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _REGISTRY:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: Any) -> None:
                run(module)
                del spec.loader.exec_module
                importlib.import_module("hfprune.loader")

            spec.loader.exec_module = run_and_register
        return spec


def _register() -> None:
    if hasattr(sys.modules.get(_REGISTRY), "register_quantizer"):
        importlib.import_module("hfprune.loader")
    else:
        sys.meta_path.insert(0, _WhenTransformersLoads)


_register()


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"hfprune.{name}")
    raise AttributeError(f"module 'hfprune' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, *_MODULES})
