"""Recordings and recognisers for tests of the wild run: sines with transcripts, and tiny random models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from hfprune.speech.audio import write_audio

LETTERS = "|abcdefghijklmnopqrstuvwxyz'"


def sine(seconds: float = 0.5, pitch: float = 440.0) -> np.ndarray:
    return (0.3 * np.sin(np.arange(int(16_000 * seconds)) * 2 * np.pi * pitch / 16_000)).astype(np.float32)


def recordings(folder: Path, **texts: str | None) -> Path:
    """A folder with a recording a name, of another pitch each, and its transcript where there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, text) in enumerate(texts.items()):
        write_audio(folder / f"{name}.wav", sine(pitch=300.0 + 100 * number))
        if text is not None:
            (folder / f"{name}.txt").write_text(text)
    return folder


def ctc(folder: Path, seed: int = 0) -> Path:
    """A Wav2Vec2 of random weights that spells letters."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *LETTERS])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
    torch.manual_seed(seed)
    config = Wav2Vec2Config(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8, 8),
        conv_kernel=(10, 8, 4),
        conv_stride=(5, 8, 8),
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        pad_token_id=0,
    )
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    return folder


def whisper(folder: Path) -> Path:
    """A Whisper of random weights, with the tokens for times and two languages."""
    folder.mkdir(parents=True, exist_ok=True)
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>"]
    special += ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    letters = [*"abcdefghijklmnopqrstuvwxyz", "Ġ"]
    vocabulary = {token: number for number, token in enumerate(letters)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = WhisperTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens([f"<|{number * 0.02:.2f}|>" for number in range(51)], special_tokens=True)
    tokenizer.save_pretrained(folder)
    number = {token: tokenizer.convert_tokens_to_ids(token) for token in special}
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=50,
        max_target_positions=24,
        pad_token_id=number["<|endoftext|>"],
        bos_token_id=number["<|endoftext|>"],
        eos_token_id=number["<|endoftext|>"],
        decoder_start_token_id=number["<|startoftranscript|>"],
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config)
    settings = {
        "is_multilingual": True,
        "lang_to_id": {f"<|{code}|>": number[f"<|{code}|>"] for code in ("en", "de")},
        "task_to_id": {task: number[f"<|{task}|>"] for task in ("transcribe", "translate")},
        "no_timestamps_token_id": number["<|notimestamps|>"],
        "max_initial_timestamp_index": 25,
        "max_length": 24,
    }
    for name, value in (settings | {"_from_model_config": False}).items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    return folder
