"""What the card of a base model says of where it comes from: licence, languages, data, its own base model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from hfprune.checkpoint.metadata import read_config
from hfprune.errors import CheckpointError

REPO_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual")
_LICENSE = ("license", "license_name", "license_link")


def read_origin(folder: str | Path) -> dict[str, Any]:
    """Licence, languages, datasets and base model, as the README.md of a model's folder says them.

    What is not there, or not in a form that the Hub takes, is left out: a card by someone else is no reason to stop.
    Where the card names no licence, that of timm's own `pretrained_cfg` counts.

    Args:
        folder: a folder with the model's files: a local one, or one of the Hub's cache.

    Returns:
        Some of `license` (str), `license_name`, `license_link` (str), `language`, `datasets`, `base_model` (lists).
    """
    folder = Path(folder)
    try:
        said = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):
        said = {}
    found = {key: said[key].strip() for key in _LICENSE if _is_word(said.get(key))}
    if "license" not in found:
        found = timm_origin(_config(folder).get("pretrained_cfg"))
    for key, form in (("language", LANGUAGE), ("datasets", REPO_ID), ("base_model", REPO_ID)):
        values = said.get(key) if isinstance(said.get(key), list) else [said.get(key)]
        if known := [value for value in values if isinstance(value, str) and form.fullmatch(value)]:
            found[key] = known
    return found


def timm_origin(pretrained_cfg: Any) -> dict[str, Any]:
    """The licence that timm records for its weights, where it does."""
    value = pretrained_cfg.get("license") if isinstance(pretrained_cfg, dict) else None
    return {"license": value.strip()} if _is_word(value) else {}


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _config(folder: Path) -> dict[str, Any]:
    try:
        return read_config(folder)
    except CheckpointError:
        return {}
