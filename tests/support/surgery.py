"""Smaller models by hand: slices of tiny ones, each with the plan that says what the slices can't."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from hfprune import PruningConfig
from hfprune.checkpoint.metadata import annotate
from hfprune.masks import MaskSet
from hfprune.structure.plan import Plan
from tests.support import models


class Surgery:
    """Cuts a model in place and keeps the plan."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.plan = Plan()
        g = torch.Generator().manual_seed(7)
        with torch.no_grad():  # values that are neither zero nor one, in norms too
            for value in model.parameters():
                value.copy_(torch.rand(value.shape, generator=g) - 0.4)

    def keep(self, kept: Iterable[int], *places: str) -> Surgery:
        """Slices tensors; a place is `name@dimension`."""
        index = torch.tensor(list(kept))
        tied: dict[int, Any] = {}
        for place in places:
            name, _, dim = place.partition("@")
            path, _, leaf = name.rpartition(".")
            owner = self.model.get_submodule(path)
            old = getattr(owner, leaf)
            if old is None:
                continue
            if id(old) not in tied:
                new = old.detach().index_select(int(dim), index)
                tied[id(old)] = nn.Parameter(new) if isinstance(old, nn.Parameter) else new
            for module in self.model.modules():
                for key, value in [*module._parameters.items(), *module._buffers.items()]:
                    if value is old:
                        setattr(module, key, tied[id(old)])
            if leaf in owner._non_persistent_buffers_set:
                self.plan.buffers.setdefault(name, {})[int(dim)] = index.tolist()
        return self

    def linear(self, kept: Iterable[int], outputs: Iterable[str] = (), inputs: Iterable[str] = ()) -> Surgery:
        """Keeps output rows of some Linear layers or convolutions, and input columns of others."""
        kept = list(kept)
        for path in outputs:
            self.keep(kept, f"{path}.weight@0", f"{path}.bias@0")
        for path in inputs:
            self.keep(kept, f"{path}.weight@1")
        for path in [*outputs, *inputs]:
            layer = self.model.get_submodule(path)
            if isinstance(layer, nn.Linear):
                layer.out_features, layer.in_features = layer.weight.shape
            elif isinstance(layer, nn.Conv2d):
                layer.out_channels, layer.in_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
        return self

    def norm(self, kept: Iterable[int], *paths: str) -> Surgery:
        kept = list(kept)
        for path in paths:
            layer = self.model.get_submodule(path)
            for leaf in ("weight", "bias", "running_mean", "running_var"):
                if getattr(layer, leaf, None) is not None:
                    self.keep(kept, f"{path}.{leaf}@0")
            if isinstance(layer, nn.LayerNorm):
                layer.normalized_shape = (len(kept),)
            elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                layer.num_features = len(kept)
        return self

    def set(self, path: str, **values: Any) -> Surgery:
        for name, value in values.items():
            setattr(self.model.get_submodule(path), name, value)
        self.plan.attributes.setdefault(path, {}).update(values)
        return self

    def drop(self, *paths: str) -> Surgery:
        """Takes blocks out of one list; always the last cut, as the paths are those of the dense model."""
        blocks = self.model.get_submodule(paths[0].rpartition(".")[0])
        kept = [block for key, block in blocks._modules.items() if key not in {p.rpartition(".")[2] for p in paths}]
        blocks._modules.clear()
        for position, block in enumerate(kept):
            blocks._modules[str(position)] = block
            for module in block.modules():
                if "layer_idx" in vars(module):
                    module.layer_idx = position
        self.plan.dropped.extend(paths)
        return self

    def config(self, **values: Any) -> Surgery:
        self.plan.config.update(values)
        return self

    def done(self) -> nn.Module:
        self.model.eval()
        annotate(self.model, PruningConfig(granularity="weight", target=0.5), no_masks(self.model), 0.5, plan=self.plan)
        return self.model


def no_masks(model: nn.Module) -> MaskSet:
    return MaskSet.from_zeros(model, [], "unstructured")


def vit(uneven: bool = True) -> nn.Module:
    """Heads and neurons of the first layer, or of both, and then also the width."""
    cut = Surgery(models.vit())
    for layer in range(1 if uneven else 2):
        path = f"vit.layers.{layer}"
        attention = [f"{path}.attention.{name}_proj" for name in "qkv"]
        if uneven:
            cut.linear(range(8, 16), attention, [f"{path}.attention.o_proj"])
            cut.set(f"{path}.attention", num_attention_heads=1)
        cut.linear([0, 2, 3, 5, 8, 13, 21], [f"{path}.mlp.fc1"], [f"{path}.mlp.fc2"])
    return cut.done() if uneven else cut.config(intermediate_size=7).done()


def vit_narrow() -> nn.Module:
    """A smaller width everywhere; heads stay as wide as they were, so head_dim no longer follows from the width."""
    cut, kept = Surgery(models.vit()), [0, 1, 3, 4, 6, 7, 9, 11, 12, 15]
    cut.keep(kept, "vit.embeddings.cls_token@2", "vit.embeddings.position_embeddings@2")
    cut.linear(kept, ["vit.embeddings.patch_embeddings.projection"], ["classifier"]).norm(kept, "vit.layernorm")
    for path in ("vit.layers.0", "vit.layers.1"):
        cut.norm(kept, f"{path}.layernorm_before", f"{path}.layernorm_after")
        inputs = [*(f"{path}.attention.{name}_proj" for name in "qkv"), f"{path}.mlp.fc1"]
        cut.linear(kept, [f"{path}.attention.o_proj", f"{path}.mlp.fc2"], inputs)
    return cut.config(hidden_size=10, head_dim=8).done()


def bert() -> nn.Module:
    """Width, the heads of one layer, the neurons of the other."""
    cut, kept = Surgery(models.bert()), [1, 2, 3, 5, 6, 8, 10, 11, 13, 14]
    embeddings = "bert.embeddings"
    for name in ("word", "position", "token_type"):
        cut.keep(kept, f"{embeddings}.{name}_embeddings.weight@1")
        cut.model.get_submodule(f"{embeddings}.{name}_embeddings").embedding_dim = len(kept)
    cut.norm(kept, f"{embeddings}.LayerNorm").linear(kept, ["bert.pooler.dense"], ["bert.pooler.dense", "classifier"])
    for i in range(2):
        path = f"bert.encoder.layer.{i}"
        inputs = [
            *(f"{path}.attention.self.{name}" for name in ("query", "key", "value")),
            f"{path}.intermediate.dense",
        ]
        cut.linear(kept, [f"{path}.attention.output.dense", f"{path}.output.dense"], inputs)
        cut.norm(kept, f"{path}.attention.output.LayerNorm", f"{path}.output.LayerNorm")
    inner = "bert.encoder.layer.1.attention"
    cut.linear(range(8), [f"{inner}.self.{n}" for n in ("query", "key", "value")], [f"{inner}.output.dense"])
    cut.set(f"{inner}.self", num_attention_heads=1, all_head_size=8)
    first = "bert.encoder.layer.0"
    return cut.linear([0, 4, 9], [f"{first}.intermediate.dense"], [f"{first}.output.dense"]).done()


def llama(tied: bool = False) -> nn.Module:
    """A group of query heads with its key and value head in one layer, other neurons in each, and the width."""
    cut, kept = Surgery(models.llama(tie_word_embeddings=tied)), list(range(0, 16, 2))
    cut.keep(kept, "model.embed_tokens.weight@1").norm(kept, "model.norm")
    if not tied:
        cut.keep(kept, "lm_head.weight@1")
    cut.model.lm_head.in_features = cut.model.model.embed_tokens.embedding_dim = len(kept)
    for i in range(2):
        path = f"model.layers.{i}"
        cut.norm(kept, f"{path}.input_layernorm", f"{path}.post_attention_layernorm")
        inputs = [*(f"{path}.self_attn.{n}_proj" for n in "qkv"), f"{path}.mlp.gate_proj", f"{path}.mlp.up_proj"]
        cut.linear(kept, [f"{path}.self_attn.o_proj", f"{path}.mlp.down_proj"], inputs)
        neurons = range(5 + 4 * i)
        cut.linear(neurons, [f"{path}.mlp.gate_proj", f"{path}.mlp.up_proj"], [f"{path}.mlp.down_proj"])
    inner = "model.layers.1.self_attn"
    cut.linear(range(8, 16), [f"{inner}.q_proj"], [f"{inner}.o_proj"])
    return cut.linear(range(4, 8), [f"{inner}.k_proj", f"{inner}.v_proj"]).done()


def llama_rotary() -> nn.Module:
    """Narrower heads: the frequencies that are kept are not those that a stock model would compute."""
    cut = Surgery(models.llama())
    for i in range(2):
        path = f"model.layers.{i}.self_attn"
        for name, heads in (("q_proj", 4), ("k_proj", 2), ("v_proj", 2)):
            cut.linear([4 * h + k for h in range(heads) for k in (1, 3)], [f"{path}.{name}"])
        cut.linear([4 * h + k for h in range(4) for k in (1, 3)], [], [f"{path}.o_proj"]).set(path, head_dim=2)
    cut.keep([1], "model.rotary_emb.inv_freq@0", "model.rotary_emb.original_inv_freq@0")
    return cut.config(head_dim=2).done()


def llama_shallow() -> nn.Module:
    """Two of four layers, whole."""
    cut = Surgery(models.llama(layers=4))
    return cut.drop("model.layers.0", "model.layers.2").config(num_hidden_layers=2).done()


def llama_shallow_uneven() -> nn.Module:
    cut = Surgery(models.llama(layers=4))
    path = "model.layers.3.mlp"
    cut.linear([1, 2, 4], [f"{path}.gate_proj", f"{path}.up_proj"], [f"{path}.down_proj"])
    return cut.drop("model.layers.1", "model.layers.2").config(num_hidden_layers=2).done()


def gpt2() -> nn.Module:
    """A head of the second layer, neurons of the first; its tied head stays tied."""
    cut = Surgery(models.gpt2())
    path = "transformer.h.1.attn"
    cut.keep([part * 16 + i for part in range(3) for i in range(8)], f"{path}.c_attn.weight@1", f"{path}.c_attn.bias@0")
    cut.keep(range(8), f"{path}.c_proj.weight@0").set(path, num_heads=1, split_size=8)
    cut.model.get_submodule(path).c_attn.nf, cut.model.get_submodule(path).c_proj.nx = 24, 8
    path = "transformer.h.0.mlp"
    cut.keep(range(30), f"{path}.c_fc.weight@1", f"{path}.c_fc.bias@0", f"{path}.c_proj.weight@0")
    cut.model.get_submodule(path).c_fc.nf = cut.model.get_submodule(path).c_proj.nx = 30
    return cut.done()


def t5() -> nn.Module:
    """A decoder head with its bias, encoder neurons."""
    config = T5Config(
        vocab_size=models.TOKENS, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=2
    )
    config.decoder_start_token_id = 0
    cut = Surgery(T5ForConditionalGeneration(config))
    path = "encoder.block.1.layer.1.DenseReluDense"
    cut.linear([0, 3, 5], [f"{path}.wi"], [f"{path}.wo"])
    for block in range(2):
        path = f"decoder.block.{block}.layer.0.SelfAttention"
        cut.linear(range(4, 8), [f"{path}.{name}" for name in "qkv"], [f"{path}.o"]).set(path, n_heads=1, inner_dim=4)
    bias = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    cut.keep([1], f"{bias}.weight@1")
    cut.model.get_submodule(bias).embedding_dim = 1
    return cut.done()


def resnet() -> nn.Module:
    """Channels inside one block, and a whole block."""
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2], layer_type="basic", num_labels=models.CLASSES
    )
    cut = Surgery(ResNetForImageClassification(config))
    path = "resnet.encoder.stages.0.layers.0.layer"
    cut.linear([0, 2, 5], [f"{path}.0.convolution"], [f"{path}.1.convolution"]).norm(
        [0, 2, 5], f"{path}.0.normalization"
    )
    return cut.drop("resnet.encoder.stages.1.layers.1").done()


def timm_vit(cut_depth: bool = True) -> nn.Module:
    """A head of the first block, and a whole block."""
    cut = Surgery(models.timm_vit())
    path = "blocks.0.attn"
    cut.linear([12 * part + i for part in range(3) for i in range(6)], [f"{path}.qkv"])
    cut.linear(range(6), [], [f"{path}.proj"]).set(path, num_heads=1, attn_dim=6)
    cut.linear(range(11), ["blocks.0.mlp.fc1"], ["blocks.0.mlp.fc2"])
    return cut.drop("blocks.1").done() if cut_depth else cut.done()


def timm_resnet() -> nn.Module:
    """Channels of the stem and of the first stage."""
    cut, kept = Surgery(models.timm_resnet()), [1, 2, 5, 7]
    cut.linear(range(10), ["conv1"], ["layer1.0.conv1"]).norm(range(10), "bn1")
    if cut.model.layer1[0].downsample is not None:
        cut.linear(range(10), [], ["layer1.0.downsample.0"])
    return cut.linear(kept, ["layer1.0.conv1"], ["layer1.0.conv2"]).norm(kept, "layer1.0.bn1").done()


class Blocks(nn.Module):
    """Convolutions, one of them depthwise, a group norm, residual blocks, a tied pair, a buffer that no file holds."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.width = width
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.GroupNorm(4, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.blocks[3].weight = self.blocks[1].weight
        self.register_buffer("gain", torch.arange(1.0, width + 1), persistent=False)
        self.register_buffer("shift", torch.arange(1.0, width + 1))
        self.window = (3, 3)
        self.head = nn.Linear(width, models.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.depthwise(self.stem(x))).relu().mean((2, 3)) * self.gain + self.shift
        assert x.shape[1] == self.width
        for block in self.blocks:
            x = x + block(x).relu()
        return self.head(x)


def own() -> nn.Module:
    cut, kept = Surgery(Blocks()), [0, 1, 4, 5]
    cut.linear(kept, ["stem", "depthwise", *(f"blocks.{i}" for i in (0, 1, 2))], ["head"])
    cut.linear(kept, [], [f"blocks.{i}" for i in (0, 1, 2)]).keep(kept, "blocks.3.bias@0", "gain@0", "shift@0")
    cut.norm(kept, "norm").set("norm", num_groups=2).set("", width=4)
    model = cut.model
    model.depthwise.groups = model.depthwise.in_channels = model.norm.num_channels = 4
    model.blocks[3].in_features = model.blocks[3].out_features = 4
    return cut.drop("blocks.0").done()


class Small(NamedTuple):
    """A smaller model, a batch, and what becomes of it: `uneven` or `uniform` in transformers, `timm` or `own`."""

    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    kind: str


def both(count: int = 3) -> dict[str, torch.Tensor]:
    ids = models.tokens(count)["input_ids"]
    return {"input_ids": ids, "decoder_input_ids": ids[:, :4]}


SMALL = {
    "vit": Small(vit, models.pixels, "uneven"),
    "vit_even": Small(lambda: vit(uneven=False), models.pixels, "uniform"),
    "vit_narrow": Small(vit_narrow, models.pixels, "uniform"),
    "bert": Small(bert, models.texts, "uneven"),
    "llama": Small(llama, models.tokens, "uneven"),
    "llama_tied": Small(lambda: llama(tied=True), models.tokens, "uneven"),
    "llama_rotary": Small(llama_rotary, models.tokens, "uneven"),
    "llama_shallow": Small(llama_shallow, models.tokens, "uniform"),
    "llama_shallow_uneven": Small(llama_shallow_uneven, models.tokens, "uneven"),
    "gpt2": Small(gpt2, models.tokens, "uneven"),
    "t5": Small(t5, both, "uneven"),
    "resnet": Small(resnet, lambda: {"pixel_values": models.images(size=32)[0]}, "uneven"),
    "timm_vit": Small(timm_vit, models.images, "timm"),
    "timm_resnet": Small(timm_resnet, lambda: models.images(size=32), "timm"),
    "own": Small(own, models.images, "own"),
}
