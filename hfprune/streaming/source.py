"""Source: a checkpoint that is read a tensor at a time, under the names that its model has for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hfprune.checkpoint.internals import as_loaded, forgivable, names_as_loaded, skeleton
from hfprune.checkpoint.metadata import BLOCK, read_config
from hfprune.checkpoint.tensors import tensor_files
from hfprune.errors import CheckpointError, and_more
from hfprune.streaming.shards import Place, places, read

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@dataclass
class Source:
    """A dense transformers checkpoint on this machine, and its model without values.

    Attributes:
        folder: of the checkpoint.
        config: what its config.json holds.
        places: the checkpoint's name of every tensor → where it lies, file by file.
        model: on the meta device.
        stored: the model's name of a tensor → the checkpoint's name, for those that are only renamed.
        parts: the model's name of any other → those of the tensors that it is joined from.
    """

    folder: Path
    config: dict[str, Any]
    places: dict[str, Place]
    model: Any
    stored: dict[str, str] = field(default_factory=dict)
    parts: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | Path, with_buffers: bool = False) -> Source:
        """Looks at the config and the headers of the files; no tensor is read.

        Args:
            folder: of a transformers model as safetensors.
            with_buffers: whether the model is to run: its buffers have values then.

        Raises:
            CheckpointError: it is no such folder, pruned or quantized already, or its tensors are not its model's.
        """
        folder = Path(folder)
        config = read_config(folder)
        _refuse_other(folder, config)
        found = _places(folder)
        source = cls(folder, config, found, _model(folder, config, found, with_buffers))
        source._look_up()
        return source

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(place.size for place in self.places.values())

    def place(self, name: str) -> Place:
        """Where a tensor of the model lies.

        Raises:
            CheckpointError: it is joined from several.
        """
        if name not in self.stored:
            parts = self.parts.get(name, [])
            raise CheckpointError(
                f"'{name}' is joined from {len(parts)} tensors of '{self.folder}' while the model is loaded, which "
                f"can't be pruned one by one; name it in pruning.ignore"
            )
        return self.places[self.stored[name]]

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the model that is stored as it is; a view of the file."""
        return read(self.place(name), self.stored[name])

    def read_some(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors of the model, also those that are joined from several."""
        found, whole = {}, {}
        for name in names:
            if name in self.stored:
                found[name] = self.read(name)
            elif name in self.parts:
                whole |= {part: read(self.places[part], part) for part in self.parts[name]}
            else:
                raise CheckpointError(f"'{self.folder}' holds no '{name}', which the model needs to run")
        return found | (as_loaded(self.model, whole)[0] if whole else {})

    def bytes_of(self, name: str) -> int:
        """Bytes that a tensor of the model takes in the files."""
        names = [self.stored[name]] if name in self.stored else self.parts.get(name, [])
        return sum(self.places[part].size for part in names)

    def _look_up(self) -> None:
        """Finds out which tensor is which."""
        model, held = self.model, _held(self.model)
        unexpected, together = set(), {}
        for original, (name, pattern) in names_as_loaded(model, self.places).items():
            if name not in held:
                unexpected.add(name)
            elif pattern is None:
                self.stored[held[name]] = original
            else:
                together.setdefault(name, []).append(original)
        for parts in together.values():
            shapes = {part: torch.empty(self.places[part].shape, device="meta") for part in parts}
            self.parts |= {held[name]: parts for name in as_loaded(model, shapes)[0]}
        missing, _ = forgivable(model, set(held.values()) - self.stored.keys() - self.parts.keys(), unexpected)
        if missing:
            lacking = sorted(missing)
            raise CheckpointError(
                f"'{self.folder}' lacks tensors of {type(model).__name__}: '{lacking[0]}'{and_more(lacking)}"
            )
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for name, original in self.stored.items():
            if shapes[name] != self.places[original].shape:
                raise CheckpointError(
                    f"'{self.folder}': '{original}' has the shape {self.places[original].shape}, and "
                    f"{type(model).__name__} takes {shapes[name]}"
                )


def stored_dtype(folder: Path) -> str:
    """The dtype, as torch calls it, that most of a checkpoint has."""
    return str(_dtype(_places(folder))).removeprefix("torch.")


def _places(folder: Path) -> dict[str, Place]:
    found: dict[str, Place] = {}
    for path in sorted(set(tensor_files(folder).values())):
        found |= places(path)
    return found


def _held(model: nn.Module) -> dict[str, str]:
    """Every name of every tensor that files hold → its first one."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in _tensors(model)}


def _tensors(model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    saved = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers(remove_duplicate=False) if name in saved)


def _refuse_other(folder: Path, config: dict[str, Any]) -> None:
    if "model_type" not in config:
        raise CheckpointError(f"'{folder}' is not the checkpoint of a transformers model; those alone are streamed")
    if config.get(BLOCK) is not None:
        raise CheckpointError(f"'{folder}' is pruned already; streaming starts from a dense checkpoint")
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"'{folder}' is quantized; streaming starts from a checkpoint of floating-point numbers")


def _model(folder: Path, config: dict[str, Any], found: dict[str, Place], with_buffers: bool) -> Any:
    import transformers

    name = (config.get("architectures") or [""])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise CheckpointError(f"'{folder}': its config names the architecture '{name}', which transformers has not")
    model = skeleton(kind, transformers.AutoConfig.from_pretrained(folder), _dtype(found), with_buffers)
    model.tie_weights()
    return model.eval()


def _dtype(found: dict[str, Place]) -> torch.dtype:
    """The dtype that most of the checkpoint has."""
    sizes: dict[str, int] = {}
    for place in found.values():
        sizes[place.dtype] = sizes.get(place.dtype, 0) + place.size
    return _DTYPES.get(max(sizes, key=sizes.get), torch.float32)
