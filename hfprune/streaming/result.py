"""What a streamed pruning writes: the checkpoint's files filled tensor by tensor, its config, and what goes along."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hfprune.checkpoint.metadata import record
from hfprune.checkpoint.tensors import write_index, write_json
from hfprune.streaming.shards import Place, ShardWriter, metadata
from hfprune.streaming.source import Source
from hfprune.streaming.weights import StreamedPruner

COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "LICENCE*")
"""Files beside the weights that belong to a model; other forms of its weights are none of them."""

OWN = ("config.json", "pruning_report.json")
"""Files that are written anew, or that say something of the dense model alone; as indices are."""


@dataclass
class Result:
    """The files of the pruned checkpoint, in the same shards as the dense one's.

    Attributes:
        source: the dense checkpoint.
        folder: where the new one is written.
        pruner: says what a unit is, where tensors are masked.
        places: the name of every tensor in the new files → a place that says its file's name, dtype and shape; by
            default as in the dense checkpoint.
        origins: those names → the dense checkpoint's.
        records: the checkpoint's name of a masked tensor → what the block says of it.
        gone: how many units are gone.
    """

    source: Source
    folder: Path
    pruner: StreamedPruner | None
    places: dict[str, Place] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    gone: int = 0

    def __post_init__(self) -> None:
        self.places = self.places or dict(self.source.places)
        self.origins = self.origins or {name: name for name in self.places}
        layout: dict[str, dict[str, Place]] = {}
        for name, place in self.places.items():
            layout.setdefault(place.path.name, {})[name] = place
        notes = {place.path.name: metadata(place.path) for place in self.places.values()}
        self.writer = ShardWriter(self.folder, layout, notes)

    def put_masked(self, name: str, value: torch.Tensor) -> None:
        """Writes a tensor of the model whose pruned elements are zero, and records where its zeros are."""
        stored = self.source.stored[name]
        self.writer.put(stored, value)
        zeros = value == 0
        self.records[stored] = record(zeros, self.pruner.pattern)
        self.gone += self.pruner.gone_in(name, zeros)

    def copy_the_rest(self) -> None:
        """Copies the tensors that are not written yet."""
        for name in self.writer.unwritten():
            self.writer.copy(name, self.source.places[self.origins[name]])

    def finish(self, config: dict[str, Any]) -> None:
        """Writes the config and the index, and copies what belongs to the model, such as its tokenizer."""
        origin = self.source.folder
        for path in {path for pattern in COPIED for path in origin.glob(pattern)}:
            if path.is_file() and not (path.name in OWN or path.name.endswith(".index.json")):
                shutil.copyfile(path, self.folder / path.name)
        write_json(self.folder / "config.json", config)
        write_index(origin, self.folder, {name: place.path.name for name, place in self.writer.places.items()})
