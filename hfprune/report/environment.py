"""environment(): what a number was measured with. Never a user's name, a host's name or a path."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

import hfprune

LIBRARIES = ("torch", "transformers", "timm")


def environment(device: torch.device | str | None = None, dtype: torch.dtype | str | None = None) -> dict[str, Any]:
    """Versions, machine, device and dtype, as plain JSON values.

    Args:
        device: where the model lay; by default the CPU.
        dtype: of the model's parameters; left out where nothing is said.
    """
    found: dict[str, Any] = {"hfprune": hfprune.__version__}
    for name in LIBRARIES:
        found[name] = importlib.metadata.version(name)
    found["python"] = platform.python_version()
    found["platform"] = f"{platform.system()} {platform.machine()}"
    found["machine"] = _machine()
    found["threads"] = torch.get_num_threads()
    found["device"] = _device_name(torch.device(device or "cpu"))
    if dtype is not None:
        found["dtype"] = str(dtype).removeprefix("torch.")
    return found


def _machine() -> str:
    """Such as '2 CPU cores (x86_64, AMD EPYC)'; the cores are those that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    kind = ", ".join(part for part in (platform.machine(), _processor()) if part)
    return f"{cores} CPU core{'' if cores == 1 else 's'} ({kind})"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    name = platform.processor()
    return "" if name == platform.machine() else name


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
