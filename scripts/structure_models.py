"""Tiny transformers models with random weights, one of every model type that the structural engine is measured on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 100


def tokens(length: int = 11) -> torch.Tensor:
    """Token ids, shape (2, length), none of them a special one."""
    return torch.randint(5, VOCABULARY - 2, (2, 11), generator=torch.Generator().manual_seed(0))[:, :length]


def noise(*shape: int) -> torch.Tensor:
    """Normal numbers, the same ones every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def text() -> dict[str, torch.Tensor]:
    """What encoders and decoders take."""
    return {"input_ids": tokens()}


def pairs() -> dict[str, torch.Tensor]:
    """What encoder-decoders take."""
    return text() | {"decoder_input_ids": tokens(7)}


def image(size: int = 32) -> dict[str, torch.Tensor]:
    """What vision models take."""
    return {"pixel_values": noise(2, 3, size, size)}


def sound() -> dict[str, torch.Tensor]:
    """What speech models take."""
    return {"input_values": noise(2, 3200)}


@dataclass(frozen=True)
class Tiny:
    """One model type.

    Attributes:
        config, model: names of its classes in transformers.
        options: what its config is made with.
        inputs: what it takes.
        heads, neurons: how many units of these kinds the model's code lets go, added over the layers: heads (of keys
            and values; once where a position bias ties the layers together), and features inside feed-forward blocks
            and poolers. None where there are none.
    """

    config: str
    model: str
    options: Mapping[str, Any]
    inputs: Mapping[str, torch.Tensor] = field(default_factory=text)
    heads: int | None = 8
    neurons: int | None = 96  # a pooler or a dense layer before the classifier adds 32

    def build(self) -> nn.Module:
        """The model in evaluation mode, its weights drawn anew at a size at which all of them show in the result."""
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.options)
        return stirred(getattr(transformers, self.model)(config).eval())

    @property
    def generates(self) -> bool:
        """Whether the model writes text."""
        return issubclass(getattr(transformers, self.model), transformers.GenerationMixin)


def stirred(model: nn.Module) -> nn.Module:
    """Draws all parameters anew: fresh models are full of zeros, ones and tiny numbers, which hide wrong cuts."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:  # made from a formula, which loading repeats
                continue
            values = torch.randn(parameter.shape, generator=draw)
            if parameter.ndim > 1:
                parameter.copy_(1.2 * values * (parameter.numel() // max(parameter.shape)) ** -0.5)
            elif name.endswith("weight") or "norm" in name.lower():
                parameter.copy_(1 + 0.3 * values)
            else:
                parameter.copy_(0.2 * values)
    return model


_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_TEXT = _SIZES | {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
_IMAGE = _SIZES | {"image_size": 32, "patch_size": 8}
_GROUPED = _TEXT | _SPECIAL | {"num_key_value_heads": 2}
_HEAD_DIM = _GROUPED | {"head_dim": 8}
_BOTH_SIDES = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
_SPEECH = _SIZES | {
    "vocab_size": 40, "conv_dim": (16, 16, 16), "conv_stride": (5, 4, 2), "conv_kernel": (10, 4, 2),
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
_STAGES = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
_PROJECTED = _TEXT | {"max_position_embeddings": 32, "projection_dim": 24}


def encoders() -> Iterator[tuple[str, Tiny]]:
    """Text encoders."""
    factors = _TEXT | {"embedding_size": 16}
    longer = _TEXT | {"max_position_embeddings": 66}
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16,
                "norm_rel_ebd": "layer_norm", "share_att_key": True}  # fmt: skip
    marks = _SPECIAL | {"cls_token_id": 1, "sep_token_id": 2}
    own_words = {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    yield "bert", Tiny("BertConfig", "BertForSequenceClassification", _TEXT, neurons=128)
    yield "roberta", Tiny("RobertaConfig", "RobertaForSequenceClassification", longer, neurons=128)
    yield "distilbert", Tiny("DistilBertConfig", "DistilBertForSequenceClassification", own_words, neurons=128)
    yield "electra", Tiny("ElectraConfig", "ElectraForSequenceClassification", factors, neurons=128)
    yield "albert", Tiny("AlbertConfig", "AlbertForSequenceClassification", factors, heads=4, neurons=80)
    yield "deberta-v2", Tiny("DebertaV2Config", "DebertaV2ForSequenceClassification", _TEXT | relative, neurons=128)
    yield "modernbert", Tiny("ModernBertConfig", "ModernBertForSequenceClassification", _TEXT | marks, neurons=128)
    yield "mpnet", Tiny("MPNetConfig", "MPNetForSequenceClassification", longer, heads=4, neurons=128)


def decoders() -> Iterator[tuple[str, Tiny]]:
    """Language models."""
    short = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    gpt2 = short | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    neo = short | {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64,
                   "intermediate_size": 48, "attention_types": [[["global", "local"], 1]]}  # fmt: skip
    opt = {"vocab_size": VOCABULARY, "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2,
           "num_attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 64}  # fmt: skip
    bloom = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    yield "gpt2", Tiny("GPT2Config", "GPT2LMHeadModel", gpt2, neurons=256)
    yield "gpt-neo", Tiny("GPTNeoConfig", "GPTNeoForCausalLM", neo)
    yield "gpt-neox", Tiny("GPTNeoXConfig", "GPTNeoXForCausalLM", _TEXT)
    yield "opt", Tiny("OPTConfig", "OPTForCausalLM", opt)
    # The slopes of its heads' position biases are computed from their number, so that no single head can go.
    yield "bloom", Tiny("BloomConfig", "BloomForCausalLM", bloom, heads=None, neurons=256)
    plain = ("Llama", "Mistral", "Qwen2", "Phi", "Phi3", "Olmo2", "Granite", "Cohere", "StableLm", "SmolLM3")
    for name in plain:
        yield name.lower(), Tiny(f"{name}Config", f"{name}ForCausalLM", _GROUPED, heads=4)
    for name, config in (("Qwen3", ""), ("Gemma", ""), ("Gemma2", ""), ("Gemma3", "Text")):
        yield name.lower(), Tiny(f"{name}{config}Config", f"{name}ForCausalLM", _HEAD_DIM, heads=4)
    falcon = _TEXT | _SPECIAL | {"new_decoder_architecture": True, "num_kv_heads": 2}
    experts = _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}
    state = _SPECIAL | {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    yield "falcon", Tiny("FalconConfig", "FalconForCausalLM", falcon, heads=4, neurons=256)
    yield "mixtral", Tiny("MixtralConfig", "MixtralForCausalLM", experts, heads=4)
    yield "mamba", Tiny("MambaConfig", "MambaForCausalLM", state, heads=None, neurons=None)


def encoder_decoders() -> Iterator[tuple[str, Tiny]]:
    """Sequence to sequence; six attentions: two layers of the encoder, and two of two kinds in the decoder."""
    t5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
          "decoder_start_token_id": 0}  # fmt: skip
    positions = {"max_position_embeddings": 64}
    marian = _BOTH_SIDES | positions | {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    whisper = _BOTH_SIDES | _SPECIAL | {"num_mel_bins": 16, "max_source_positions": 50, "max_target_positions": 20,
                                        "decoder_start_token_id": 1}  # fmt: skip
    spoken = {"input_features": noise(2, 16, 100), "decoder_input_ids": tokens(7)}
    # One (zero) position bias ties the heads of all cross-attentions together, as the learned ones do the others.
    yield "t5", Tiny("T5Config", "T5ForConditionalGeneration", t5, pairs(), 12, 192)
    yield "bart", Tiny("BartConfig", "BartForConditionalGeneration", _BOTH_SIDES | positions, pairs(), 24, 192)
    yield "marian", Tiny("MarianConfig", "MarianMTModel", marian, pairs(), 24, 192)
    yield "whisper", Tiny("WhisperConfig", "WhisperForConditionalGeneration", whisper, spoken, 24, 192)


def vision() -> Iterator[tuple[str, Tiny]]:
    """Image classifiers, detectors, segmenters."""
    ratio = {name: value for name, value in _IMAGE.items() if name != "intermediate_size"}
    windows = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
               "window_size": 4}  # fmt: skip
    convnext = {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1]}
    segformer = {"hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 8],
                 "decoder_hidden_size": 32, "num_labels": 5}  # fmt: skip
    mobile = {"image_size": 64, "hidden_sizes": [32, 40, 48], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64],
              "num_attention_heads": 4}  # fmt: skip
    backbone = transformers.ResNetConfig(**_STAGES, out_features=["stage4"])
    boxes = {"use_timm_backbone": False, "backbone_config": backbone, "num_queries": 7}
    detr = {name: value for name, value in _BOTH_SIDES.items() if name != "vocab_size"} | boxes
    bias = _IMAGE | {"use_relative_position_bias": True}
    yield "vit", Tiny("ViTConfig", "ViTForImageClassification", _IMAGE, image())
    yield "deit", Tiny("DeiTConfig", "DeiTForImageClassification", _IMAGE, image())
    yield "beit", Tiny("BeitConfig", "BeitForImageClassification", bias, image())
    yield "swin", Tiny("SwinConfig", "SwinForImageClassification", windows, image(), 12, 384)
    yield "convnext", Tiny("ConvNextConfig", "ConvNextForImageClassification", convnext, image(), None, 576)
    yield "resnet", Tiny("ResNetConfig", "ResNetForImageClassification", _STAGES, image(), None, None)
    yield "dinov2", Tiny("Dinov2Config", "Dinov2ForImageClassification", ratio, image(), neurons=256)
    yield "segformer", Tiny("SegformerConfig", "SegformerForSemanticSegmentation", segformer, image(), 14, None)
    yield "mobilevit", Tiny("MobileViTConfig", "MobileViTForImageClassification", mobile, image(64), 36, 736)
    # Its pooling attention is torch's own, whose heads always fill the width.
    yield "siglip", Tiny("SiglipVisionConfig", "SiglipVisionModel", _IMAGE, image(), 8, 144)
    yield "detr", Tiny("DetrConfig", "DetrForObjectDetection", detr, image(64), 24, 256)


def others() -> Iterator[tuple[str, Tiny]]:
    """Speech, and models of images and text."""
    pictures = _IMAGE | {"projection_dim": 24}
    clip = {"text_config": _PROJECTED | _SPECIAL, "vision_config": pictures, "projection_dim": 24}
    writer = _PROJECTED | _SPECIAL | {"encoder_hidden_size": 32, "sep_token_id": 3}
    blip = {"text_config": writer, "vision_config": _IMAGE, "projection_dim": 24}
    yield "wav2vec2", Tiny("Wav2Vec2Config", "Wav2Vec2ForCTC", _SPEECH, sound())
    yield "hubert", Tiny("HubertConfig", "HubertForCTC", _SPEECH, sound())
    yield "clip", Tiny("CLIPConfig", "CLIPModel", clip, text() | image(), 16, 192)
    # Its vision tower computes the size of a head from its input's width and the number of heads.
    yield "blip", Tiny("BlipConfig", "BlipForConditionalGeneration", blip, text() | image(), 16, 192)


def all_models() -> dict[str, Tiny]:
    """Every model type by name."""
    return {n: t for kind in (encoders, decoders, encoder_decoders, vision, others) for n, t in kind()}
