"""Between dense and sparse storage: the same checkpoint, its files rewritten one by one."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hfprune.checkpoint.bitmask import SUFFIXES, pack
from hfprune.checkpoint.files import side_folder
from hfprune.checkpoint.foreign import find_foreign, refuse_pickles
from hfprune.checkpoint.merge import is_factored, merge_folder
from hfprune.checkpoint.metadata import BLOCK, MARKER, as_dense, check_block, with_format
from hfprune.checkpoint.save import WEIGHTS_FILES
from hfprune.checkpoint.tensors import INDEX_FILE, SHAPES, read_each, tensor_files, write_index, write_json
from hfprune.checkpoint.verify import verify
from hfprune.errors import CheckpointError

Tell = Callable[[str, int, int], None]

STORED = MARKER | {"storage_only": True}
"""What config.json says to transformers where a checkpoint needs hfprune for nothing but its sparse files."""


def convert(folder: str | Path, output: str | Path, *, sparse: bool, tell: Tell | None = None) -> Path:
    """Writes a checkpoint anew with its masked tensors stored sparse, or all of them dense; bit by bit the same model.

    Dense means that factored layers are merged, too: then it is the same to rounding.

    Args:
        folder: a checkpoint with an hfprune block, or one that another tool stored sparse (`checkpoint.foreign`).
        output: made where it is missing; another folder than `folder`. What is not weights is copied.
        sparse: which of the two.
        tell: hears how far it is: what is done, how many tensors of it are, and of how many.

    Raises:
        CheckpointError: the folder is not a checkpoint or does not match its metadata, or the files could not be
            written; `output` is then as it was. Folders inside `folder`, such as the dense baseline, are not copied.
    """
    folder, output = Path(folder), Path(output)
    if output.resolve() == folder.resolve():
        raise CheckpointError(f"'{output}' is the folder that is read; give another one to write to")
    refuse_pickles(folder)
    foreign = find_foreign(folder)
    if foreign is None and not sparse and is_factored(folder):
        return merge_folder(folder, output)
    if foreign is None:
        if tell is not None:
            tell("checking", 0, 0)
        found = verify(folder)
        found.raise_if_bad(folder)
        if not found.tensors:
            raise CheckpointError(f"'{folder}' has no recorded sparsity: there is nothing to convert")
    weights = {INDEX_FILE, *(path.name for path in tensor_files(folder).values())}
    with side_folder(output, replaces=WEIGHTS_FILES) as side:
        for path in folder.iterdir():
            if path.is_file() and path.name not in weights:
                shutil.copy2(path, side)
        if foreign is not None:
            foreign.write(side)
        store(folder if foreign is None else side, side, sparse=sparse, tell=tell)
    return output


def store(folder: Path, target: Path, *, sparse: bool, but: Iterable[str] = (), tell: Tell | None = None) -> None:
    """Writes a folder's weights with every recorded tensor stored sparse where that takes less room, or all dense.

    Args:
        folder: whose weights.
        target: where they go, file by file; the same folder, or another one that has its config.json.
        sparse: which of the two.
        but: tensors that stay dense.
        tell: as for `convert`.
    """
    config, but = _config(target), set(but)
    records = check_block(config[BLOCK], str(target / "config.json")).get("sparsity", {}) if sparse else {}
    found: dict[str, str] = {}
    files: dict[str, str] = {}
    stored = tensor_files(folder)
    done = itertools.count(1)
    for path in sorted(set(stored.values())):
        tensors, shapes = {}, {}
        for name, tensor in read_each(path):
            if tell is not None:
                tell("packing" if sparse else "expanding", next(done), len(stored))
            packed = _packed(tensor, records[name]["pattern"]) if name in records and name not in but else None
            if packed is None:
                tensors[name] = tensor
                continue
            how, values, places = packed
            first, second = (name + end for end in SUFFIXES[how])
            tensors |= {first: values, second: places}
            found[name], shapes[name] = how, list(tensor.shape)
        _write(path, target, tensors, shapes)
        files |= dict.fromkeys(tensors, path.name)
    _finish(folder, target, config, found, files)


def _packed(tensor: torch.Tensor, pattern: str) -> tuple[str, torch.Tensor, torch.Tensor] | None:
    """The encoding that fits, and the two parts; None where the tensor is as well stored dense."""
    for how in ("2:4", "bitmask") if pattern == "2:4" else ("bitmask",):
        if (parts := pack(tensor, how)) is not None:
            return how, *parts
    return None


def _write(path: Path, target: Path, tensors: dict[str, torch.Tensor], shapes: dict[str, list[int]]) -> None:
    """A file of the same name; where it takes the place of the one it was read from, only when it is whole."""
    with safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in (file.metadata() or {}).items() if key != SHAPES}
    if shapes:
        metadata[SHAPES] = json.dumps(shapes)
    fresh = target / f"{path.stem}.rewritten"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, fresh, metadata=metadata)
    fresh.replace(target / path.name)


def _finish(folder: Path, target: Path, config: dict[str, Any], found: dict[str, str], files: dict[str, str]) -> None:
    """Sets what config.json and the index say of the files.

    Args:
        folder: where the index stands.
        target: where the files were written.
        config: what config.json holds.
        found: tensor name → encoding.
        files: name in the files → file.
    """
    config[BLOCK] = as_dense(config[BLOCK])
    if found:
        config[BLOCK] = with_format(config[BLOCK] | {"encodings": found})
    if "model_type" in config:
        mark = config.get("quantization_config")
        if found and mark is None:
            config["quantization_config"] = STORED
        elif not found and mark == STORED:
            del config["quantization_config"]
    write_json(target / "config.json", config)
    write_index(folder, target, files)


def _config(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict) or BLOCK not in config:
        raise CheckpointError(f"'{folder}' has no block '{BLOCK}' in its config.json")
    return config
