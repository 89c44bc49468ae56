"""What of a checkpoint folder goes to the Hub, and what must not."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from hfprune.checkpoint.verify import verify
from hfprune.errors import CheckpointError
from hfprune.secrets import holds_token

# A training's own state, which is of use to this machine alone, and whatever may be a pickle.
STAYS = (
    "pruning_state.json",
    "pruning_masks.safetensors",
    "pruning_best.safetensors",
    "pruning_history.safetensors",
    "pruning_held*",
    "trainer_state.json",
    "training_args.json",
    "training_processes.json",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.pkl",
    "*.pickle",
)
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
# What a push before this one may have left under other names: a loader could take it for the model, a reader for facts.
REPLACED = (
    *WEIGHTS,
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
    "pytorch_model.bin.index.json",
    "pruning_report.json",
    "recipe.yaml",
    "sparsity.png",
    "units.png",
    "trajectory.png",
)
_TEXTS = (".json", ".jsonl", ".md", ".txt", ".yaml", ".yml", ".py", ".cfg", ".toml", ".ini", ".csv", ".log")


def contents(folder: str | Path) -> dict[str, Path]:
    """The files of a checkpoint that are pushed, by the name that they get: weights first, then the others.

    Sub-folders (training checkpoints, the dense baseline, earlier runs), hidden files, pickles and a training's own
    state stay here.

    Raises:
        CheckpointError: the folder is no whole checkpoint, its tensors do not match its metadata, or a file holds what
            looks like an access token.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"'{folder}' is no folder")
    verify(folder).raise_if_bad(folder)
    files = {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".") and not matches(path.name, STAYS)
    }
    for path in files.values():
        if path.suffix in _TEXTS and holds_token(path.read_text(encoding="utf-8", errors="replace")):
            raise CheckpointError(f"'{path}' holds what looks like an access token: remove it before you push")
    weights = [name for name in files if matches(name, WEIGHTS)]
    return {name: files[name] for name in [*weights, *(n for n in files if n not in weights)]}


def card_for(text: str, folder: Path, repo: str) -> str:
    """A card as it stands in a repository: what loads the model names the repository in place of the folder.

    Args:
        text: the card of a checkpoint folder.
        folder: that folder; a card may also name it as it was called when the card was written.
        repo: the repository's id.
    """
    named = re.search(r"^# (.+)$", text, re.MULTILINE)
    for name in {folder.resolve().name, *([named[1].strip()] if named else [])}:
        text = text.replace(f'from_pretrained("{name}"', f'from_pretrained("{repo}"')
        text = text.replace(f'"local-dir:{name}"', f'"hf-hub:{repo}"')
    return text


def stale(there: Iterable[str], files: Iterable[str]) -> list[str]:
    """The files of a repository that an earlier push left and this one does not replace."""
    return sorted({name for name in there if matches(name, REPLACED)} - set(files))


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file's name is one of those that the patterns mean."""
    return any(fnmatch(name, pattern) for pattern in patterns)
