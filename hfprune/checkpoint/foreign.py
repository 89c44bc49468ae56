"""Checkpoints that other tools stored sparse: those of compressed-tensors, and masks of torch.nn.utils.prune.

compressed-tensors, up to 0.14, wrote a weight `NAME.weight` as `NAME.compressed`, its values in row-major order,
`NAME.bitmask`, a row of bytes for every row of the weight, the lowest bit first, `NAME.shape` and, in one of its two
formats, `NAME.row_offsets`, which follow from the bits. torch.nn.utils.prune holds a parameter `NAME` as `NAME_orig`
and `NAME_mask`, whose product it is. The parts of a tensor may lie in different files.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from hfprune.checkpoint.bitmask import check_mask, expand
from hfprune.checkpoint.metadata import BLOCK, imported_block, read_config, record
from hfprune.checkpoint.tensors import INDEX_FILE, Shape, opened, tensor_files, write_index, write_json
from hfprune.errors import CheckpointError

LEGACY = "compressed-tensors"
TORCH = "torch.nn.utils.prune"
FORMATS = ("sparse-bitmask", "sparse-24-bitmask")
"""The formats of compressed-tensors that can be read."""

LEGACY_PARTS = (".compressed", ".bitmask", ".shape")
OFFSETS = ".row_offsets"
_TORCH_PARTS = ("_orig", "_mask")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Foreign:
    """A folder of another tool.

    Attributes:
        folder: where it lies.
        config: what its config.json holds; empty where it has none.
        origin: the tool, LEGACY or TORCH.
        pattern: of the zeros in its sparse tensors.
        parts: tensor → the names of its parts in the files.
        files: name in the files → file.
    """

    folder: Path
    config: dict[str, Any]
    origin: str
    pattern: str
    parts: dict[str, tuple[str, ...]]
    files: dict[str, Path]

    def check(self) -> None:
        """Compares the parts with one another, as far as that needs no expansion.

        Raises:
            CheckpointError: they do not belong together.
        """
        with ExitStack() as stack:
            opens = {path: stack.enter_context(opened(path)) for path in set(self.files.values())}
            for name, parts in self.parts.items():
                if self.origin == LEGACY:
                    values, bits, shape = (opens[self.files[part]].get_tensor(part) for part in parts)
                    _named(self.folder, name, legacy_mask, values, bits, shape_of(shape))

    def write(self, target: Path) -> None:
        """Writes the weights dense, with a config.json that records where they are zero.

        Raises:
            CheckpointError: the parts of a tensor do not belong together.
        """
        inner = {part: name for name, parts in self.parts.items() for part in parts}
        offsets = {name.removesuffix(".weight") + OFFSETS for name in self.parts} if self.origin == LEGACY else set()
        records, files = {}, {}
        with ExitStack() as stack:
            opens = {path: stack.enter_context(opened(path)) for path in sorted(set(self.files.values()))}
            for path, file in opens.items():
                tensors = {}
                for stored in file.keys():  # noqa: SIM118  (not a dict)
                    name = inner.get(stored, stored)
                    if name == stored and name not in offsets:
                        tensors[name] = file.get_tensor(name)
                    elif name != stored and stored == self.parts[name][0]:
                        parts = [opens[self.files[part]].get_tensor(part) for part in self.parts[name]]
                        way = expand_legacy if self.origin == LEGACY else _masked
                        tensors[name] = _named(self.folder, name, way, *parts)
                        records[name] = record(tensors[name] == 0, self.pattern)
                save_file(tensors, target / path.name, metadata={"format": "pt"})
                files |= dict.fromkeys(tensors, path.name)
        config = {k: v for k, v in self.config.items() if k not in ("quantization_config", "compression_config")}
        block = {BLOCK: imported_block(self.origin, dict(sorted(records.items())))}
        write_json(target / "config.json", config | block)
        write_index(self.folder, target, files)


def find_foreign(folder: Path) -> Foreign | None:
    """What another tool stored sparse in a folder; None where there is nothing of the kind.

    Raises:
        CheckpointError: its weights are quantized, or it lacks a part of a tensor.
    """
    config = _config(folder)
    if BLOCK in config:
        return None
    if not (folder / "model.safetensors").is_file() and not (folder / INDEX_FILE).is_file():
        return None
    style = legacy_format(config, str(folder))
    files = tensor_files(folder)
    if style is not None:
        return replace(legacy_tensors(folder, files), config=config)
    names = [name.removesuffix("_orig") for name in files if name.endswith("_orig")]
    masked = {name: tuple(name + end for end in _TORCH_PARTS) for name in names}
    masked = {name: parts for name, parts in masked.items() if all(part in files for part in parts)}
    return Foreign(folder, config, TORCH, "unstructured", masked, files) if masked else None


def refuse_pickles(folder: Path) -> None:
    """Raises a CheckpointError for a folder whose weights are pickled, and says how to write them anew."""
    if any(folder.glob("*.safetensors")):
        return
    if pickles := sorted(path for pattern in _PICKLES for path in folder.glob(pattern)):
        raise CheckpointError(
            f"'{pickles[0]}' is a pickle, which hfprune never opens; this makes a file that it reads: "
            f"safetensors.torch.save_file(torch.load('{pickles[0].name}', weights_only=True), 'model.safetensors')"
        )


def legacy_tensors(folder: Path, files: dict[str, Path]) -> Foreign:
    """The sparse tensors among those that compressed-tensors wrote.

    Args:
        folder: where they lie.
        files: name in the files → file.

    Raises:
        CheckpointError: a tensor lacks one of its parts.
    """
    inner = sorted({name.removesuffix(end) for name in files for end in LEGACY_PARTS[:2] if name.endswith(end)})
    found = {name + ".weight": tuple(name + end for end in LEGACY_PARTS) for name in inner}
    for name, parts in found.items():
        if missing := [part for part in parts if part not in files]:
            raise CheckpointError(f"'{folder}' lacks '{missing[0]}', a part of the sparse tensor '{name}'")
    # Of its two formats the one without offsets is that of 2:4.
    unstructured = not found or any(name + OFFSETS in files for name in inner)
    return Foreign(folder, {}, LEGACY, "unstructured" if unstructured else "2:4", found, files)


def legacy_format(config: dict[str, Any], where: str) -> str | None:
    """In which sparse format of compressed-tensors a config says that the weights are; None where in none.

    Raises:
        CheckpointError: they are quantized too, or in a format that can't be read.
    """
    method = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(method, dict) or method.get("quant_method", LEGACY) != LEGACY:
        return None
    sparsity = method.get("sparsity_config")
    style = sparsity.get("format", "dense") if isinstance(sparsity, dict) else "dense"
    if style == "dense":
        return None
    if method.get("config_groups") or method.get("kv_cache_scheme") or method.get("format", "dense") != "dense":
        raise CheckpointError(f"'{where}' is quantized and sparse: hfprune reads what is sparse and not quantized")
    if style not in FORMATS:
        raise CheckpointError(f"'{where}' is stored as {style!r:.80}; hfprune reads {' and '.join(FORMATS)}")
    return style


def shape_of(tensor: torch.Tensor) -> Shape:
    """The shape that `NAME.shape` holds."""
    return tuple(tensor.flatten().tolist())


def expand_legacy(values: torch.Tensor, bits: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    """A tensor of compressed-tensors, dense.

    Raises:
        CheckpointError: the parts do not belong together.
    """
    size = shape_of(shape)
    return expand(values.flatten(), legacy_mask(values, bits, size), int(np.prod(size))).view(size)


def legacy_mask(values: torch.Tensor, bits: torch.Tensor, shape: Shape) -> np.ndarray:
    """The mask of a whole tensor, whose rows stand in whole bytes in the file.

    Raises:
        CheckpointError: the parts do not belong together.
    """
    if not shape or bits.dtype != torch.uint8 or tuple(bits.shape) != (*shape[:-1], -(-shape[-1] // 8)):
        raise CheckpointError(f"a mask of the shape {tuple(bits.shape)} does not fit the shape {shape}")
    mask = bits.cpu().numpy()
    if shape[-1] % 8:
        mask = np.packbits(np.unpackbits(mask, axis=-1, count=shape[-1], bitorder="little"), bitorder="little")
    mask = mask.reshape(-1)
    check_mask(mask, values.flatten())
    return mask


def _masked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The product, in which what the mask holds at zero is +0.0 whatever stood there."""
    if values.shape != mask.shape:
        raise CheckpointError(f"a mask of the shape {tuple(mask.shape)} does not fit the shape {tuple(values.shape)}")
    gone = mask == 0
    if not bool((gone | (mask == 1)).all()):
        values = values * mask.to(values.dtype)
    return values.masked_fill(gone, 0)


def _named(folder: Path, name: str, way: Any, *parts: Any) -> Any:
    try:
        return way(*parts)
    except CheckpointError as error:
        raise CheckpointError(f"'{folder}': '{name}' can't be expanded: {error}") from error


def _config(folder: Path) -> dict[str, Any]:
    return read_config(folder) if (folder / "config.json").is_file() else {}
