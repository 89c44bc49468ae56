"""verify(): does a checkpoint hold what its metadata says?"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from hfprune.checkpoint.metadata import read_block
from hfprune.errors import CheckpointError
from hfprune.masks import mask_hash


@dataclass
class Verification:
    """What `verify` found.

    Attributes:
        tensors: how many recorded tensors were looked at; 0 for a checkpoint without an hfprune block.
        zeros, numel: of these tensors together, as they are in the files.
        more_zeros: how many zeros there are beyond those recorded, which is no harm: training may reach zero too.
        problems: one line for each tensor that does not match its record; empty when all is well.
    """

    tensors: int = 0
    zeros: int = 0
    numel: int = 0
    more_zeros: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every tensor matches its record."""
        return not self.problems

    def raise_if_bad(self, folder: str | Path) -> None:
        """Raises a CheckpointError that names the first tensor that does not match."""
        if self.problems:
            more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
            raise CheckpointError(f"'{folder}' does not match its metadata: {self.problems[0]}{more}")


def verify(folder: str | Path) -> Verification:
    """Compares every recorded tensor of a checkpoint folder with its record: zeros, shape and where the zeros are.

    The tensors are read one at a time; no model is built.

    Args:
        folder: a checkpoint.

    Raises:
        CheckpointError: the folder is not a checkpoint, or a file of it is missing or damaged.
    """
    folder = Path(folder)
    block = read_block(folder)
    found = Verification()
    if block is None:
        return found
    places = tensor_files(folder)
    for name, record in block.get("sparsity", {}).items():
        found.tensors += 1
        if name not in places:
            found.problems.append(f"'{name}' is recorded, but no file holds it")
            continue
        tensor = _read(places[name], name)
        zeros = tensor == 0
        count = int(zeros.sum())
        found.zeros += count
        found.numel += zeros.numel()
        if zeros.numel() != record["numel"]:
            found.problems.append(f"'{name}' has {zeros.numel()} elements, {record['numel']} are recorded")
        elif count < record["zeros"]:
            found.problems.append(
                f"'{name}' has {count} zeros, {record['zeros']} are recorded: "
                f"{record['zeros'] - count} that were zero no longer are"
            )
        elif count == record["zeros"] and mask_hash(zeros) != record["sha256"]:
            found.problems.append(f"'{name}' has as many zeros as recorded, but in other places")
        found.more_zeros += max(0, count - record["zeros"])
    return found


def tensor_files(folder: Path) -> dict[str, Path]:
    """Which safetensors file of a checkpoint holds which tensor.

    Raises:
        CheckpointError: there are none, or one named by the index is missing or damaged.
    """
    index = folder / "model.safetensors.index.json"
    names = _indexed(index) if index.is_file() else ["model.safetensors"]
    places = {}
    for name in names:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"'{folder}' is not a whole checkpoint: '{name}' is missing")
        places.update(dict.fromkeys(header(path), path))
    return places


def header(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that a safetensors file holds; none is read.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"'{path}' is damaged: {error}") from error


def _indexed(index: Path) -> list[str]:
    """The files that an index names."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"'{index}' is damaged: it holds no map of files") from error
    if not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"'{index}' is damaged: it names no files")
    return sorted(names)


def _read(path: Path, name: str):
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"'{path}' is damaged: {error}") from error
