"""Images as the model takes them: size, channels, normalisation, and random shifts while training."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Array2D, Array3D, Dataset, Image, Value
from PIL import Image as Picture
from PIL import UnidentifiedImageError
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F
from transformers import PreTrainedModel, TimmWrapperConfig

from hfprune.errors import ConfigError, DataError
from hfprune.recipe import DataSection

# Up to so many bytes of pixels are decoded once and kept; beyond, images are decoded as they are asked for.
KEPT_BYTES = 512 * 2**20


@dataclass
class ImageShape:
    """What an image becomes. `size` is (height, width) in pixels; `mean` and `std` have one value a channel."""

    size: tuple[int, int]
    channels: int
    mean: list[float]
    std: list[float]


class ImageRows(torch.utils.data.Dataset):
    """Images and classes as rows of `pixel_values` (channels, height, width) and `labels`.

    A batch is fetched, shifted and normalised as one tensor. Shifts depend on the seed, the epoch and the images of the
    batch alone, so that a run that resumes in the middle of an epoch sees the same images.

    Args:
        pixels: the images at some indices as one tensor (batch, channels, height, width): bytes, or floats in [0, 1].
        labels: one class index an image.
        shape: mean and std.
        augment: shift each image at random by up to an eighth of its size.
        mirror: with `augment`: mirror every other image.
    """

    def __init__(
        self,
        pixels: Callable[[Tensor], Tensor],
        labels: list[int],
        shape: ImageShape,
        *,
        augment: bool = False,
        mirror: bool = False,
        seed: int = 0,
    ):
        self.pixels = pixels
        self.labels = list(labels)
        self.augment = augment
        self.mirror = mirror
        self.seed = seed
        self.epoch = self.first_epoch = 0
        self._mean = torch.tensor(shape.mean).view(1, -1, 1, 1)
        self._std = torch.tensor(shape.std).view(1, -1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader when an epoch begins; of several trainings, one after another, each counts on from
        `first_epoch`."""
        self.epoch = self.first_epoch + epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        indices = [index % len(self) for index in indices]
        batch = self.pixels(torch.tensor(indices))
        if self.augment:
            drawn = zlib.crc32(np.array([self.seed, self.epoch, *indices], dtype=np.int64).tobytes())
            batch = shift(batch, self.mirror, torch.Generator().manual_seed(drawn))
        batch = batch.float().div_(255) if batch.dtype == torch.uint8 else batch
        batch = (batch - self._mean) / self._std
        return [
            {"pixel_values": image, "labels": self.labels[i]} for image, i in zip(batch.unbind(), indices, strict=True)
        ]


def shift(batch: Tensor, mirror: bool, generator: torch.Generator) -> Tensor:
    """Each image of a batch (batch, channels, height, width) moved at random by up to an eighth, over black."""
    count, channels, height, width = batch.shape
    down, right = max(1, round(height / 8)), max(1, round(width / 8))
    padded = nn.functional.pad(batch, (right, right, down, down))
    rows = torch.randint(2 * down + 1, (count, 1), generator=generator) + torch.arange(height)
    columns = torch.randint(2 * right + 1, (count, 1), generator=generator) + torch.arange(width)
    if mirror:
        columns = torch.where(torch.rand(count, 1, generator=generator) < 0.5, columns.flip(1), columns)
    places = rows[:, :, None] * padded.shape[3] + columns[:, None, :]
    places = places.view(count, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, places).view(batch.shape)


def collate_images(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows to a batch of `pixel_values` (batch, channels, height, width) and `labels` (batch,)."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def prepare_images(
    train: Dataset, evaluation: Dataset, section: DataSection, model: nn.Module, processor: Any, seed: int
) -> tuple[ImageRows, ImageRows, Callable, dict[str, Any]]:
    """Training rows, evaluation rows, collator and facts.

    Raises:
        DataError: images that can't be read.
        ConfigError: an image size, mean or std that the model can't take.
    """
    train, evaluation = _as_images(train, section), _as_images(evaluation, section)
    shape = image_shape(section, model, processor, train)
    _record(shape, model, processor, section)
    mirror = section.name != "digits"
    rows = [
        ImageRows(_pixels(part, shape, section), part["label"][:], shape, augment=augment, mirror=mirror, seed=seed)
        for part, augment in ((train, section.augment), (evaluation, False))
    ]
    facts = {"image_size": list(shape.size), "channels": shape.channels, "mean": shape.mean, "std": shape.std}
    return *rows, collate_images, facts


def image_shape(section: DataSection, model: nn.Module, processor: Any, images: Dataset) -> ImageShape:
    """Size, channels and normalisation: as the recipe says, else as the model says, else as the first image is."""
    config = model.config if isinstance(model, PreTrainedModel) else None
    of_timm = config.pretrained_cfg if isinstance(config, TimmWrapperConfig) else {}
    first = _first_image(images, section)
    size = section.image_size or of_timm.get("input_size", (0,))[1:] or getattr(config, "image_size", None)
    size = _pair(size or _processor_size(processor) or first.shape[1:])
    if of_timm.get("fixed_input_size") and tuple(of_timm["input_size"][1:]) != size:
        takes = "x".join(str(side) for side in of_timm["input_size"][1:])
        raise ConfigError(
            f"data.image_size: {section.image_size}, but the model takes {takes}; --set model.args.img_size={size[0]}"
        )
    convolution = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    channels = of_timm.get("input_size", (None,))[0] or getattr(config, "num_channels", None)
    if channels is None:
        channels = convolution.in_channels if convolution is not None else first.shape[0]
    if channels not in (1, 3):
        raise ConfigError(f"data.image_column: the model takes {channels} channels; images have 1 or 3")
    return ImageShape(
        size,
        channels,
        _statistic("mean", section.mean, of_timm.get("mean") or getattr(processor, "image_mean", None), channels),
        _statistic("std", section.std, of_timm.get("std") or getattr(processor, "image_std", None), channels),
    )


def _statistic(key: str, said: list[float] | None, own: Any, channels: int) -> list[float]:
    """One value a channel. A model's three values for one channel become their mean, as timm does it."""
    if said is not None:
        if len(said) not in (1, channels) or (key == "std" and min(said) <= 0):
            raise ConfigError(f"data.{key}: {said}, but the model takes {channels} channels; std is above 0")
        values = said
    else:
        values = list(own) if own else [0.5]
    if len(values) != channels:
        values = [sum(values) / len(values)] * channels
    return [float(value) for value in values]


def _processor_size(processor: Any) -> Any:
    for name in ("crop_size", "size"):
        size = getattr(processor, name, None)
        if size:
            size = dict(size)
            return (size["height"], size["width"]) if "height" in size else size.get("shortest_edge")
    return None


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _record(shape: ImageShape, model: nn.Module, processor: Any, section: DataSection) -> None:
    """Writes into config or processor how images are prepared, so that the saved model's users prepare them alike."""
    if isinstance(model, PreTrainedModel) and isinstance(model.config, TimmWrapperConfig):
        cfg = model.config.pretrained_cfg
        cfg.update(input_size=[shape.channels, *shape.size], mean=shape.mean, std=shape.std, crop_pct=1.0)
        cfg["interpolation"] = "bilinear"
        for key in ("test_input_size", "test_crop_pct"):
            cfg.pop(key, None)
    elif processor is not None and (section.mean or section.std or section.image_size):
        processor.image_mean, processor.image_std = shape.mean, shape.std
        processor.size = {"height": shape.size[0], "width": shape.size[1]}


def _as_images(rows: Dataset, section: DataSection) -> Dataset:
    kind = rows.features["image"]
    if isinstance(kind, Value) and "string" in kind.dtype:
        return rows.cast_column("image", Image())
    if not isinstance(kind, Image | Array2D | Array3D):
        raise DataError(f"data.image_column: a column of '{section.name}' that holds no images was named")
    return rows


def _first_image(rows: Dataset, section: DataSection) -> Tensor:
    """The first image as it is (channels, height, width)."""
    if not isinstance(rows.features["image"], Image):
        return _array(rows.select([0]))[0]
    picture = _open(rows, [0], section)[0]
    return F.pil_to_tensor(picture.convert("L" if picture.mode in ("1", "L", "I;16") else "RGB"))


def _pixels(rows: Dataset, shape: ImageShape, section: DataSection) -> Callable[[Tensor], Tensor]:
    """How to have the images at some indices: from memory where they are few, else decoded each time."""
    if not isinstance(rows.features["image"], Image):
        images = _array(rows)
        if images.shape[1] != shape.channels:
            images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images.float().mean(1, keepdim=True)
        images = _fit(images, shape.size)
        return images.__getitem__

    def decode(indices: Tensor) -> Tensor:
        mode = "L" if shape.channels == 1 else "RGB"
        pictures = _open(rows, indices.tolist(), section)
        return torch.stack([F.pil_to_tensor(_fit(picture.convert(mode), shape.size)) for picture in pictures])

    if len(rows) * shape.channels * shape.size[0] * shape.size[1] > KEPT_BYTES:
        return decode
    chunks = torch.arange(len(rows)).split(256)
    return torch.cat([decode(chunk) for chunk in chunks]).__getitem__


def _open(rows: Dataset, indices: list[int], section: DataSection) -> list[Picture.Image]:
    try:
        return rows[indices]["image"]
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(f"data.name: '{section.name}' holds an image that can't be read: {error}") from error


def _array(rows: Dataset) -> Tensor:
    """Images kept as numbers: bytes, or floats in [0, 1]; (images, channels, height, width)."""
    values = np.asarray(rows.with_format("numpy")["image"][:])
    if values.ndim == 3:
        values = values[:, None]
    elif values.shape[-1] in (1, 3):
        values = values.transpose(0, 3, 1, 2)
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.float() if tensor.is_floating_point() else tensor.to(torch.uint8)


def _fit(image: Any, size: tuple[int, int]) -> Any:
    """A picture or tensor resized until it covers `size`, and its middle cut out."""
    height, width = F.get_size(image)
    if (height, width) == size:
        return image
    scale = max(size[0] / height, size[1] / width)
    covering = [max(size[0], round(height * scale)), max(size[1], round(width * scale))]
    return F.center_crop(F.resize(image, covering, antialias=True), list(size))
