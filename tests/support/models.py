"""Tiny models, each built in milliseconds, and batches that they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

CLASSES = 4
TOKENS = 32


class MLP(nn.Module):
    """Linear layers around a BatchNorm and a dropout."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.first = nn.Linear(8, width)
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.dropout(self.norm(self.first(x)).relu()))


class CNN(nn.Module):
    """Convolutions with BatchNorm and a linear head."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, bias=False)
        self.norm2 = nn.BatchNorm2d(12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.head(x.mean((2, 3)))


class Tied(nn.Module):
    """Two layers that share one weight; its first name in the model is the last in the alphabet."""

    def __init__(self):
        super().__init__()
        self.upper = nn.Linear(8, 8)
        self.lower = nn.Linear(8, 8)
        self.lower.weight = self.upper.weight
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lower(self.upper(x).relu()).relu())


class Convolutions(nn.Module):
    """Grouped, transposed and grouped transposed convolutions, in one and two dimensions."""

    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=2)
        self.transposed = nn.ConvTranspose2d(16, 6, 3)
        self.both = nn.ConvTranspose2d(6, 12, 2, groups=3)
        self.line = nn.Conv1d(12, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.both(self.transposed(self.grouped(x).relu()).relu()).relu()
        return self.line(x.flatten(2)).mean(2)[:, :CLASSES]


class Recurrent(nn.Module):
    """An LSTM in two directions."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Attention(nn.Module):
    """Fused attention, once with one projection for all and once with three."""

    def __init__(self):
        super().__init__()
        self.same = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=4, vdim=4, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.same(x, x, x)
        x, _ = self.cross(x, x[..., :4], x[..., :4])
        return self.head(x.mean(1))


def vit(**options: Any) -> ViTForImageClassification:
    """Its tensors bear other names on disk."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    images = {"image_size": 8, "patch_size": 4, "num_labels": CLASSES}
    return ViTForImageClassification(ViTConfig(**sizes | images | options)).eval()


def bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=TOKENS,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
            num_labels=CLASSES,
        )
    ).eval()


def gpt2() -> GPT2LMHeadModel:
    """Linear layers that stand inputs x outputs, and a head tied to the embedding."""
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=TOKENS, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    ).eval()


def llama(layers: int = 2, **options: Any) -> LlamaForCausalLM:
    """Two query heads a key and value head."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=TOKENS,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
            **options,
        )
    ).eval()


def timm_vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=2, num_classes=CLASSES
    ).eval()


def timm_resnet() -> nn.Module:
    return timm.create_model(
        "resnet18", layers=[1, 1, 1, 1], channels=[8, 8, 12, 12], stem_width=8, num_classes=CLASSES
    ).eval()


def timm_coat() -> nn.Module:
    """Blocks of one stage share their position encoding."""
    return timm.create_model(
        "coat_tiny", img_size=32, embed_dims=[8] * 4, serial_depths=[2] * 4, num_heads=8, num_classes=CLASSES
    ).eval()


def vectors(count: int = 6, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 8, generator=g), torch.randint(CLASSES, (count,), generator=g)


def sequences(count: int = 4, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, 8, generator=g), torch.randint(CLASSES, (count,), generator=g)


def images(count: int = 4, size: int = 8, seed: int = 1, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, size, size, generator=g), torch.randint(CLASSES, (count,), generator=g)


def pixels(count: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    inputs, labels = images(count, seed=seed)
    return {"pixel_values": inputs, "labels": labels}


def tokens(count: int = 3, seed: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.randint(TOKENS, (count, 10), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def texts(count: int = 3, seed: int = 1) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(TOKENS, (count, 10), generator=g),
        "labels": torch.randint(CLASSES, (count,), generator=g),
    }


class Tiny(NamedTuple):
    """A model, a batch with labels, and how it is loaded again: `own`, `timm` or `transformers`."""

    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    kind: str


TINY = {
    "mlp": Tiny(MLP, vectors, "own"),
    "cnn": Tiny(CNN, images, "own"),
    "tied": Tiny(Tied, vectors, "own"),
    "convolutions": Tiny(Convolutions, lambda: images(size=6, channels=8), "own"),
    "lstm": Tiny(Recurrent, sequences, "own"),
    "attention": Tiny(Attention, sequences, "own"),
    "vit": Tiny(vit, pixels, "transformers"),
    "bert": Tiny(bert, texts, "transformers"),
    "gpt2": Tiny(gpt2, tokens, "transformers"),
    "llama": Tiny(llama, tokens, "transformers"),
    "timm_vit": Tiny(timm_vit, images, "timm"),
    "timm_resnet": Tiny(timm_resnet, lambda: images(size=32), "timm"),
}


def logits(model: nn.Module, batch: Any) -> torch.Tensor:
    """What the model answers to a batch, in evaluation mode; the mode is put back."""
    training = model.training
    model.eval()
    with torch.no_grad():
        if isinstance(batch, dict):
            output = model(**{key: value for key, value in batch.items() if key != "labels"})
        else:
            output = model(batch[0])
    model.train(training)
    return output if isinstance(output, torch.Tensor) else output.logits


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that must survive a failure: values, gradients and flags, copied."""
    state: dict[str, Any] = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state[f"{name} grad"] = None if parameter.grad is None else parameter.grad.clone()
        state[f"{name} requires_grad"] = parameter.requires_grad
        state[f"{name} place"] = parameter.data_ptr()
    state |= {f"{name} training": module.training for name, module in model.named_modules()}
    return state


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether two snapshots are equal to the last bit."""
    return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)


def _same(left: Any, right: Any) -> bool:
    if not isinstance(left, torch.Tensor):
        return left == right
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    left, right = left.contiguous().flatten(), right.contiguous().flatten()
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8)) if left.numel() else True
