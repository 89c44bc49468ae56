"""The tensors of a checkpoint folder, dense or sparse on disk: which file holds which, their shapes, their values."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from hfprune.checkpoint.bitmask import SUFFIXES, check_parts, unpack, unpack_zeros
from hfprune.errors import CheckpointError

Shape = tuple[int, ...]
T = TypeVar("T")

SHAPES = "hfprune_shapes"
"""The key in a file's metadata under which the shapes of sparse tensors stand: a JSON map of name to list."""

INDEX_FILE = "model.safetensors.index.json"


def bytes_on_disk(folder: str | Path) -> int:
    """What the tensors of a checkpoint folder take on disk."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def tensor_files(folder: Path) -> dict[str, Path]:
    """Which safetensors file of a checkpoint holds which tensor; sparse ones under their own names.

    Raises:
        CheckpointError: there are none, or one named by the index is missing or damaged.
    """
    index = folder / INDEX_FILE
    names = _indexed(index) if index.is_file() else ["model.safetensors"]
    places = {}
    for name in names:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"'{folder}' is not a whole checkpoint: '{name}' is missing")
        places.update(dict.fromkeys(header(path), path))
    return places


def header(path: Path) -> dict[str, Shape]:
    """The shapes of the tensors that a safetensors file holds, as they are when they are dense; none is read.

    Raises:
        CheckpointError: the file is damaged.
    """
    with opened(path) as file:
        return {name: shape for name, (shape, _) in _contents(path, file).items()}


def encodings(path: Path) -> dict[str, str]:
    """The sparse tensors of a file, and how each is stored (`bitmask.ENCODINGS`).

    Raises:
        CheckpointError: the file is damaged.
    """
    with opened(path) as file:
        return {name: how for name, (_, how) in _contents(path, file).items() if how}


def check_sparse(path: Path) -> None:
    """Compares the parts of a file's sparse tensors with one another; their values are not read.

    Raises:
        CheckpointError: the file is damaged, or a sparse tensor's parts do not belong together.
    """
    with opened(path) as file:
        for name, (shape, how) in _contents(path, file).items():
            if how:
                _expanded(check_parts, path, file, name, shape, how)


def read_zeros(path: Path, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Where tensors of a file equal zero, one after the other: name and bools in its shape.

    Raises:
        CheckpointError: the file is damaged, or a sparse tensor's parts do not belong together.
    """
    with opened(path) as file:
        contents = _contents(path, file)
        for name in names:
            shape, how = contents[name]
            yield name, _expanded(unpack_zeros, path, file, name, shape, how) if how else file.get_tensor(name) == 0


def read_each(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a file, dense, one after the other; raises as `read_zeros` does."""
    with opened(path) as file:
        for name, (shape, how) in _contents(path, file).items():
            yield name, _expanded(unpack, path, file, name, shape, how) if how else file.get_tensor(name)


def read_all(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, dense; raises as `read_zeros` does."""
    return dict(read_each(path))


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file; what is wrong with it is a CheckpointError."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"'{path}' is damaged: {error}") from error


def _contents(path: Path, file: Any) -> dict[str, tuple[Shape, str]]:
    """Name to shape and encoding, which is empty for dense tensors."""
    names = list(file.keys())
    shapes = _sparse_shapes(path, file.metadata() or {})
    found: dict[str, tuple[Shape, str]] = {}
    parts: set[str] = set()
    for name, shape in shapes.items():
        how = next((e for e, ends in SUFFIXES.items() if all(name + end in names for end in ends)), None)
        if how is None or name in names:
            raise CheckpointError(f"'{path}' is damaged: it does not hold both parts of the sparse tensor '{name}'")
        found[name] = shape, how
        parts |= {name + end for end in SUFFIXES[how]}
    return {n: (tuple(file.get_slice(n).get_shape()), "") for n in names if n not in parts} | found


def _sparse_shapes(path: Path, metadata: dict[str, str]) -> dict[str, Shape]:
    try:
        shapes = {name: tuple(shape) for name, shape in json.loads(metadata.get(SHAPES, "{}")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"'{path}' is damaged: '{SHAPES}' is no map of shapes") from error
    if not all(type(size) is int and size >= 0 for shape in shapes.values() for size in shape):
        raise CheckpointError(f"'{path}' is damaged: '{SHAPES}' is no map of shapes")
    return shapes


def _expanded(way: Callable[..., T], path: Path, file: Any, name: str, shape: Shape, how: str) -> T:
    values, places = (file.get_tensor(name + end) for end in SUFFIXES[how])
    try:
        return way(values, places, shape, how)
    except CheckpointError as error:
        raise CheckpointError(f"'{path}': '{name}' can't be expanded: {error}") from error


def _indexed(index: Path) -> list[str]:
    """The files that an index names."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"'{index}' is damaged: it holds no map of files") from error
    if not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"'{index}' is damaged: it names no files")
    return sorted(names)


def write_index(folder: Path, target: Path, files: dict[str, str]) -> None:
    """Where a folder has an index of its files, writes that of the files in `target`: name → file."""
    if not (folder / INDEX_FILE).is_file():
        return
    index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    index["weight_map"] = dict(sorted(files.items()))
    total = sum(_tensor_bytes(target / name) for name in set(files.values()))
    index["metadata"] = (index.get("metadata") or {}) | {"total_size": total}
    write_json(target / INDEX_FILE, index)


def _tensor_bytes(path: Path) -> int:
    """Bytes of a file's tensors: all that follows its header, whose length stands in the first eight bytes."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
