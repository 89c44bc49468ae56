"""Small recognisers to train from nothing, for runs that download nothing."""

from __future__ import annotations

import json
import string
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import pre_tokenizers
from transformers import (
    GenerationConfig,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from hfprune.errors import ConfigError
from hfprune.scratch import END
from hfprune.speech.audio import RATE

LETTERS = string.ascii_lowercase + "'"


_CTC = {
    "feat_extract_norm": "layer",
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "bos_token_id": None,
    "eos_token_id": None,
    "ctc_loss_reduction": "mean",
    "ctc_zero_infinity": True,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
}
"""What every small Wav2Vec2 here is made with."""


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

    In a recipe it is the model `hfprune.scratch_speech:small_wav2vec2`, with these arguments under `model.args`.

    Source: Baevski 2020, arXiv 2006.11477; CTC after Graves 2006.

    Args:
        hidden_size, intermediate_size: widths of the residual stream and of the feed-forward part.
        layers, heads: transformer blocks, and attention heads of each.
        channels: of the convolutions that hear.
        kernels, strides: theirs, one of each a convolution, large ones being quicker; by default a frame every 20 ms.
        activation: of convolutions and feed-forward parts; `relu` is quicker.
        letters: what it can write beside spaces; texts are written in the case that they know.
        stable_layer_norm: norms before the parts of a block, as in the large models.
        dropout: while training, wherever the architecture has some.

    Raises:
        ConfigError: the numbers of kernels and strides differ.
    """
    hearing = _convolutions(channels, kernels or [10, 5, 4, 4, 4], strides or [5, 4, 4, 2, 2], activation)
    processor = _letter_processor(letters)
    rates = ("hidden", "activation", "attention", "feat_proj", "final")
    config = Wav2Vec2Config(
        vocab_size=len(processor.tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        **hearing,
        hidden_act=activation,
        do_stable_layer_norm=stable_layer_norm,
        pad_token_id=processor.tokenizer.pad_token_id,
        **{f"{name}_dropout": dropout for name in rates},
        **_CTC,
    )
    return Wav2Vec2ForCTC(config), processor


def _letter_processor(letters: str) -> Wav2Vec2Processor:
    return Wav2Vec2Processor(
        feature_extractor=Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True, do_normalize=True),
        tokenizer=letter_tokenizer(letters),
    )


def _convolutions(channels: int, kernels: list[int], strides: list[int], activation: str) -> dict[str, Any]:
    """What a config says of the part that hears."""
    if len(kernels) != len(strides):
        raise ConfigError(f"model.args.strides: {len(kernels)} kernels need as many strides, not {len(strides)}")
    sizes = {"conv_dim": [channels] * len(kernels), "conv_kernel": kernels, "conv_stride": strides}
    return {**sizes, "feat_extract_activation": activation}


def letter_tokenizer(letters: str) -> Wav2Vec2CTCTokenizer:
    """A tokenizer for CTC: the blank, a token for what it can't write, a mark between words, and these letters."""
    tokens = ["<pad>", "<unk>", "|", *dict.fromkeys(letters)]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.json"
        path.write_text(json.dumps({token: index for index, token in enumerate(tokens)}), encoding="utf-8")
        return Wav2Vec2CTCTokenizer(str(path), bos_token=None, eos_token=None)


def small_whisper(
    *,
    hidden_size: int = 64,
    intermediate_size: int = 160,
    encoder_layers: int = 2,
    decoder_layers: int = 2,
    heads: int = 4,
    mel_bins: int = 40,
    seconds: int = 30,
    longest_text: int = 128,
    dropout: float = 0.0,
) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """A Whisper with random weights that writes bytes, and its processor.

    It knows one language and no other task, as Whisper's English models. In a recipe it is the model
    `hfprune.scratch_speech:small_whisper`, with these arguments under `model.args`.

    Source: Radford 2022, arXiv 2212.04356.

    Args:
        hidden_size, intermediate_size: widths of the residual stream and of the feed-forward part.
        encoder_layers, decoder_layers, heads: transformer blocks, and attention heads of each.
        mel_bins: bands of the spectrogram that it hears.
        seconds: how much it hears at once; whatever is shorter is padded to it.
        longest_text: what it writes at most, in bytes and the tokens before and after them.
        dropout: while training.
    """
    tokenizer = whisper_tokenizer(seconds)
    start, end = tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", END])
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=hidden_size,
        encoder_ffn_dim=intermediate_size,
        decoder_ffn_dim=intermediate_size,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        num_mel_bins=mel_bins,
        max_source_positions=50 * seconds,
        max_target_positions=longest_text,
        dropout=dropout,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = _whisper_generation(config, tokenizer)
    extractor = WhisperFeatureExtractor(feature_size=mel_bins, sampling_rate=RATE, chunk_length=seconds)
    return model, WhisperProcessor(extractor, tokenizer)


def _whisper_generation(config: WhisperConfig, tokenizer: WhisperTokenizer) -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        max_length=config.max_target_positions,
        # What Whisper's own generation looks for beside the usual.
        is_multilingual=False,
        return_timestamps=False,
        no_timestamps_token_id=tokenizer.convert_tokens_to_ids("<|notimestamps|>"),
    )


def whisper_tokenizer(seconds: int) -> WhisperTokenizer:
    """Whisper's tokenizer over single bytes, which can write any text, with marks of time for so many seconds."""
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), END]
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[], pad_token=END, predict_timestamps=False)
    marks = ["startoftranscript", "translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps"]
    times = [f"{index / 50:.2f}" for index in range(50 * seconds + 1)]
    tokenizer.add_tokens([f"<|{mark}|>" for mark in marks], special_tokens=True)
    tokenizer.add_tokens([f"<|{time}|>" for time in times])
    tokenizer.set_prefix_tokens(predict_timestamps=False)  # anew, with the tokens that were added
    return tokenizer
