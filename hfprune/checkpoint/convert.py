"""Between dense and sparse storage: the same checkpoint, its files rewritten one by one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hfprune.checkpoint.bitmask import SUFFIXES, pack
from hfprune.checkpoint.files import side_folder
from hfprune.checkpoint.merge import is_factored, merge_folder
from hfprune.checkpoint.metadata import BLOCK, MARKER, as_dense, check_block, with_format
from hfprune.checkpoint.tensors import INDEX_FILE, SHAPES, encodings, read_all, tensor_files
from hfprune.checkpoint.verify import verify
from hfprune.errors import CheckpointError

STORED = MARKER | {"storage_only": True}
"""What config.json says to transformers where a checkpoint needs hfprune for nothing but its sparse files."""


def convert(folder: str | Path, output: str | Path, *, sparse: bool) -> Path:
    """Writes a checkpoint anew with its masked tensors stored sparse, or all of them dense; bit by bit the same model.

    Dense means that factored layers are merged, too: then it is the same to rounding.

    Args:
        folder: a checkpoint with an hfprune block.
        output: made where it is missing; another folder than `folder`. What is not weights is copied.
        sparse: which of the two.

    Raises:
        CheckpointError: the folder is not a checkpoint or does not match its metadata, or the files could not be
            written; `output` is then as it was. Folders inside `folder`, such as the dense baseline, are not copied.
    """
    folder, output = Path(folder), Path(output)
    if not sparse and is_factored(folder):
        return merge_folder(folder, output)
    if output.resolve() == folder.resolve():
        raise CheckpointError(f"'{output}' is the folder that is read; give another one to write to")
    found = verify(folder)
    found.raise_if_bad(folder)
    if not found.tensors:
        raise CheckpointError(f"'{folder}' has no recorded sparsity: there is nothing to convert")
    with side_folder(output) as side:
        for path in folder.iterdir():
            if path.is_file():
                shutil.copy2(path, side)
        (store_sparse if sparse else store_dense)(side)
    return output


def store_sparse(folder: Path) -> dict[str, str]:
    """Rewrites a folder's files with every recorded tensor stored sparse where that takes less room.

    Returns:
        Tensor name to encoding.
    """
    config = _config(folder)
    records = check_block(config[BLOCK], str(folder / "config.json")).get("sparsity", {})
    found: dict[str, str] = {}
    for path in sorted(set(tensor_files(folder).values())):
        tensors, shapes = {}, {}
        for name, tensor in read_all(path).items():
            parts = _packed(tensor, records[name]["pattern"]) if name in records else None
            if parts is None:
                tensors[name] = tensor
                continue
            how, (values, places) = parts
            first, second = (name + end for end in SUFFIXES[how])
            tensors |= {first: values, second: places}
            found[name], shapes[name] = how, list(tensor.shape)
        _rewrite(path, tensors, shapes)
    _finish(folder, config, found)
    return found


def store_dense(folder: Path) -> None:
    """Rewrites a folder's files with every tensor dense."""
    for path in sorted(set(tensor_files(folder).values())):
        if encodings(path):
            _rewrite(path, read_all(path), {})
    _finish(folder, _config(folder), {})


def _packed(tensor: torch.Tensor, pattern: str) -> tuple[str, tuple[torch.Tensor, torch.Tensor]] | None:
    """The encoding that fits, and the two parts; None where the tensor is as well stored dense."""
    for how in ("2:4", "bitmask") if pattern == "2:4" else ("bitmask",):
        if (parts := pack(tensor, how)) is not None:
            return how, parts
    return None


def _rewrite(path: Path, tensors: dict[str, torch.Tensor], shapes: dict[str, list[int]]) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in (file.metadata() or {}).items() if key != SHAPES}
    if shapes:
        metadata[SHAPES] = json.dumps(shapes)
    fresh = path.with_suffix(".rewritten")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, fresh, metadata=metadata)
    fresh.replace(path)


def _finish(folder: Path, config: dict[str, Any], found: dict[str, str]) -> None:
    """Sets what config.json and the index say of the files."""
    config[BLOCK] = as_dense(config[BLOCK])
    if found:
        config[BLOCK] = with_format(config[BLOCK] | {"encodings": found})
    if "model_type" in config:
        mark = config.get("quantization_config")
        if found and mark is None:
            config["quantization_config"] = STORED
        elif not found and mark == STORED:
            del config["quantization_config"]
    _write_json(folder / "config.json", config)
    if (folder / INDEX_FILE).is_file():
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        places: dict[str, str] = {}
        total = 0
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                places |= dict.fromkeys(file.keys(), path.name)
            total += _tensor_bytes(path)
        index["weight_map"] = dict(sorted(places.items()))
        index["metadata"] = index.get("metadata", {}) | {"total_size": total}
        _write_json(folder / INDEX_FILE, index)


def _tensor_bytes(path: Path) -> int:
    """Bytes of a file's tensors: all that follows its header, whose length stands in the first eight bytes."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def _config(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict) or BLOCK not in config:
        raise CheckpointError(f"'{folder}' has no block '{BLOCK}' in its config.json")
    return config


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
