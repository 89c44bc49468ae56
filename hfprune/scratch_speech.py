"""Small recognisers to train from nothing, for runs that download nothing."""

from __future__ import annotations

import json
import string
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
)

from hfprune.speech.audio import RATE

LETTERS = string.ascii_lowercase + "'"


def small_wav2vec2(
    *,
    hidden_size: int = 96,
    intermediate_size: int = 256,
    layers: int = 4,
    heads: int = 4,
    channels: int = 64,
    kernels: list[int] | None = None,
    strides: list[int] | None = None,
    activation: str = "gelu",
    letters: str = LETTERS,
    stable_layer_norm: bool = False,
    dropout: float = 0.0,
) -> tuple[Wav2Vec2ForCTC, Wav2Vec2Processor]:
    """A Wav2Vec2 with random weights that writes letters, and its processor.

    It hears sound of 16,000 samples a second. In a recipe it is the model
    `hfprune.scratch_speech:small_wav2vec2`, with these arguments under `model.args`.

    Source: Baevski 2020, arXiv 2006.11477; CTC after Graves 2006.

    Args:
        hidden_size, intermediate_size: widths of the residual stream and of the feed-forward part.
        layers, heads: transformer blocks, and attention heads of each.
        channels: of the convolutions that hear.
        kernels, strides: theirs, one of each a convolution; by default a frame every 20 ms. Large ones at the start are
            quicker.
        activation: of convolutions and feed-forward parts; `relu` is quicker.
        letters: what it can write beside spaces; texts are written in the case that they know.
        stable_layer_norm: norms before the parts of a block, as in the large models.
        dropout: while training, wherever the architecture has some.
    """
    processor = Wav2Vec2Processor(
        feature_extractor=Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True, do_normalize=True),
        tokenizer=letter_tokenizer(letters),
    )
    kernels, strides = kernels or [10, 5, 4, 4, 4], strides or [5, 4, 4, 2, 2]
    rates = ("hidden", "activation", "attention", "feat_proj", "final")
    config = Wav2Vec2Config(
        vocab_size=len(processor.tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        conv_dim=(channels,) * len(kernels),
        conv_kernel=kernels,
        conv_stride=strides,
        feat_extract_activation=activation,
        hidden_act=activation,
        feat_extract_norm="layer",
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        do_stable_layer_norm=stable_layer_norm,
        pad_token_id=processor.tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
        ctc_loss_reduction="mean",
        ctc_zero_infinity=True,
        apply_spec_augment=False,
        layerdrop=0.0,
        **{f"{name}_dropout": dropout for name in rates},
    )
    return Wav2Vec2ForCTC(config), processor


def letter_tokenizer(letters: str) -> Wav2Vec2CTCTokenizer:
    """A tokenizer for CTC that knows these letters, a mark between words, one for what it can't write, and the blank."""
    tokens = ["<pad>", "<unk>", "|", *dict.fromkeys(letters)]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.json"
        path.write_text(json.dumps({token: index for index, token in enumerate(tokens)}), encoding="utf-8")
        return Wav2Vec2CTCTokenizer(str(path), bos_token=None, eos_token=None)
