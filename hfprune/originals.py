"""Originals: the values of parameters before they were changed, to be put back when something fails."""

from __future__ import annotations

import tempfile
from typing import NamedTuple

import torch
from torch import nn

from hfprune.errors import ModelError

IN_MEMORY = 1 << 26
"""Bytes up to which the values are held in memory; beyond, they lie in a temporary file."""


class _Place(NamedTuple):
    parameter: nn.Parameter
    start: int


class Originals:
    """Copies of parameters in a file that goes with the object, so that they don't double the memory of a large model.

    Example:
        >>> with Originals() as originals:
        ...     originals.keep(layer.weight)
        ...     layer.weight.data.zero_()
        ...     originals.restore()
    """

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115  (closed by __exit__)
        self._places: dict[int, _Place] = {}

    def __enter__(self) -> Originals:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def keep(self, parameter: nn.Parameter) -> None:
        """Copies a parameter as it is, unless an earlier state of it is held already.

        Raises:
            ModelError: the disk is full.
        """
        if id(parameter) in self._places:
            return
        values = parameter.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy()
        try:
            self._file.seek(0, 2)
            start = self._file.tell()
            self._file.write(values.data)
        except OSError as error:
            where = tempfile.gettempdir()
            raise ModelError(f"no room in {where} for a copy of the weights that change: {error.strerror}") from error
        self._places[id(parameter)] = _Place(parameter, start)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts every parameter back as it was when it was kept."""
        for parameter, start in self._places.values():
            self._file.seek(start)
            values = bytearray(self._file.read(parameter.numel() * parameter.element_size()))
            if values:
                parameter.copy_(torch.frombuffer(values, dtype=parameter.dtype).view(parameter.shape))
        self._places.clear()
