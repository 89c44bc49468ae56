"""verify(): does a checkpoint hold what its metadata says?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hfprune.bits import mask_hash
from hfprune.checkpoint.metadata import read_block
from hfprune.checkpoint.tensors import read_zeros, tensor_files
from hfprune.errors import CheckpointError, and_more
from hfprune.hub.reach import folder_of


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

    def add(self, name: str, zeros: torch.Tensor, record: dict[str, Any]) -> None:
        """Compares the zeros of one tensor with its record."""
        count = int(np.count_nonzero(zeros.numpy()))  # torch adds up bools far more slowly
        self.zeros += count
        self.numel += zeros.numel()
        self.more_zeros += max(0, count - record["zeros"])
        if zeros.numel() != record["numel"]:
            self.problems.append(f"'{name}' has {zeros.numel()} elements, {record['numel']} are recorded")
        elif count < record["zeros"]:
            self.problems.append(
                f"'{name}' has {count} zeros, {record['zeros']} are recorded: "
                f"{record['zeros'] - count} that were zero no longer are"
            )
        elif count == record["zeros"] and mask_hash(zeros) != record["sha256"]:
            self.problems.append(f"'{name}' has as many zeros as recorded, but in other places")

    def raise_if_bad(self, folder: str | Path) -> None:
        """Raises a CheckpointError that names the first tensor that does not match."""
        if self.problems:
            found = f"{self.problems[0]}{and_more(self.problems)}"
            raise CheckpointError(f"'{folder}' does not match its metadata: {found}")

    def words(self) -> str:
        """What was found, for a person, where all is well."""
        if not self.tensors:
            return "no sparsity is recorded"
        more = f"; {self.more_zeros:,} more than recorded" if self.more_zeros else ""
        share = f"{self.zeros / self.numel:.2%} of {self.numel:,} are zero"
        return f"{self.tensors} tensors match their records, {share}{more}"


def verify(folder: str | Path, revision: str | None = None) -> Verification:
    """Compares every recorded tensor of a checkpoint folder with its record: zeros, shape and where the zeros are.

    The tensors are read one at a time; no model is built.

    Args:
        folder: a checkpoint: a folder, or a repository on the Hub (`OWNER/NAME`).
        revision: a branch, tag or commit of the repository.

    Raises:
        CheckpointError: the folder is not a checkpoint, or a file of it is missing or damaged.
        NotReachable: the repository could not be had.
    """
    folder = folder_of(folder, revision)
    block = read_block(folder)
    found = Verification()
    if block is None:
        return found
    places, records = tensor_files(folder), block.get("sparsity", {})
    found.problems += [f"'{name}' is recorded, but no file holds it" for name in records if name not in places]
    found.tensors = len(records)
    for path in sorted({places[name] for name in records if name in places}):
        for name, zeros in read_zeros(path, [name for name in records if places.get(name) == path]):
            found.add(name, zeros, records[name])
    return found
