"""Recordings and transcripts as recognisers take them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Audio, Dataset
from torch import Tensor, nn
from transformers import Wav2Vec2CTCTokenizer

from hfprune.data.sources import text_features
from hfprune.errors import ConfigError, DataError, ModelError
from hfprune.recipe import DataSection
from hfprune.speech.audio import read_audio, resampled, seconds_of
from hfprune.speech.captions import Caption, joined
from hfprune.speech.normalise import code_of, normaliser
from hfprune.speech.recognisers import Kind, frames_of, kind_of, texts_of

# Up to so many bytes of samples are decoded once and kept; beyond, recordings are decoded as they are asked for.
KEPT_BYTES = 512 * 2**20


class SpeechRows(torch.utils.data.Dataset):
    """Recordings as rows of `input_values` (samples,) or `input_features` (bins, frames), and `labels` (tokens,).

    Args:
        clips: what to read.
        extractor: the model's feature extractor.
        name: of the model's main input.
    """

    def __init__(self, clips: list[Clip], extractor: Any, name: str):
        self.clips, self.extractor, self.name = clips, extractor, name

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        clip = self.clips[index]
        rate = self.extractor.sampling_rate
        extracted = self.extractor(clip.read(rate), sampling_rate=rate)
        return {self.name: np.asarray(extracted[self.name][0], np.float32), "labels": clip.labels}


@dataclass
class Clip:
    """A recording or a part of one, read when it is asked for unless it is kept.

    Attributes:
        value: as a dataset holds it: a path, `{"bytes", "path"}`, or `{"array", "sampling_rate"}`.
        base: the folder that relative paths start from.
        name: how a message calls it.
        labels: the tokens of its transcript.
        samples: where they are kept.
        start, stop: of a part, in seconds.
    """

    value: Any
    base: Path
    name: str
    labels: list[int] = field(default_factory=list)
    samples: np.ndarray | None = None
    start: float = 0.0
    stop: float | None = None

    def read(self, rate: int) -> np.ndarray:
        """Its samples (samples,) at a rate.

        Raises:
            DataError: it can't be decoded.
        """
        if self.samples is not None:
            return self.samples
        return self._read(rate) if self.stop is None else self.part_of(self._read(rate), rate)

    def part_of(self, whole: np.ndarray, rate: int) -> np.ndarray:
        """Its own samples (samples,), copied from those of its recording.

        Raises:
            DataError: the recording is over before it begins.
        """
        part = whole[round(self.start * rate) : round((self.stop or 0) * rate)].copy()
        if not len(part):
            raise DataError(f"'{self.name}' holds no sound at {self.start:g} s")
        return part

    def _read(self, rate: int) -> np.ndarray:
        if isinstance(self.value, dict) and self.value.get("array") is not None:
            samples = np.asarray(self.value["array"], np.float32)
            return resampled(samples.mean(axis=0) if samples.ndim > 1 else samples, self.value["sampling_rate"], rate)
        return read_audio(self._source(), rate, self.name)

    def seconds(self) -> float:
        """How long its recording is, without decoding it where that can be known."""
        if isinstance(self.value, dict) and self.value.get("array") is not None:
            return np.shape(self.value["array"])[-1] / self.value["sampling_rate"]
        return seconds_of(self._source(), self.name)

    def _source(self) -> bytes | Path:
        value = self.value if isinstance(self.value, dict) else {"path": self.value}
        if value.get("bytes") is not None:
            return value["bytes"]
        if not isinstance(value.get("path"), str):
            raise DataError(f"{self.name} holds neither a path nor bytes of a recording")
        return self.base / value["path"]


@dataclass
class SpeechCollator:
    """Rows to a batch: `input_values` (batch, samples) with their `attention_mask`, or `input_features` (batch, bins,
    frames) with the `decoder_input_ids` (batch, tokens) that go before each label; and `labels` (batch, tokens), padded
    with -100.

    Attributes:
        extractor: pads what is heard.
        name: of the model's main input.
        start: the token that a decoder starts from, which it is not asked for; None for CTC.
    """

    extractor: Any
    name: str
    start: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        heard = self.extractor.pad([{self.name: row[self.name]} for row in rows], padding=True, return_tensors="pt")
        skipped = int(self.start is not None and all(row["labels"][0] == self.start for row in rows))
        labels = [torch.tensor(row["labels"][skipped:]) for row in rows]
        padded = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        if self.start is None:
            return {**heard, "labels": padded}
        shifted = padded.roll(1, dims=1)
        shifted[:, 0] = self.start
        return {**heard, "decoder_input_ids": shifted.masked_fill(shifted < 0, self.start), "labels": padded}


def prepare_speech(
    train: Dataset, evaluation: Dataset, section: DataSection, model: nn.Module, processor: Any
) -> tuple[SpeechRows, SpeechRows, Callable, dict[str, Any]]:
    """Training rows, evaluation rows, collator and facts, among them `left_out`: a line on what can't be used and why.

    Raises:
        ModelError: the model is no recogniser, or lacks what hears and reads for it.
        DataError: nothing can be used.
        ConfigError: a multilingual model without a language.
    """
    kind = kind_of(model)
    if kind is None:
        raise ModelError(f"model.name: {type(model).__name__} is no recogniser; speech-recognition needs one")
    if not hasattr(processor, "feature_extractor") or not hasattr(processor, "tokenizer"):
        raise ModelError("model.name: a recogniser needs a processor: a feature extractor and a tokenizer")
    if "text" not in text_features(train):
        raise DataError(f"data.text_columns: a column of '{section.name}' that holds no text was named")
    _fit(model, processor, section, kind)
    left_out: Counter[str] = Counter()
    chosen = _Chooser(section, model, processor, kind, left_out)
    extractor, heard = processor.feature_extractor, model.main_input_name
    parts = [SpeechRows(chosen(part), extractor, heard) for part in (train, evaluation)]
    lines = [f"{number} {reason}" for reason, number in left_out.items()]
    for name, part in zip(("train on", "evaluate on"), parts, strict=True):
        if not len(part):
            raise DataError(f"data.name: '{section.name}' has no recording to {name}; left out: {', '.join(lines)}")
    start = model.config.decoder_start_token_id if kind == "seq2seq" else None
    facts: dict[str, Any] = {"sampling_rate": extractor.sampling_rate}
    if lines:
        what = "recordings and clips" if chosen.cut else "recordings"
        facts["left_out"] = f"{left_out.total()} of {chosen.seen} {what} are left out: {', '.join(lines)}"
    return *parts, SpeechCollator(extractor, heard, start), facts


def _fit(model: nn.Module, processor: Any, section: DataSection, kind: Kind) -> None:
    """Sets what model and tokenizer must agree on."""
    config, tokenizer = model.config, processor.tokenizer
    if kind == "ctc":
        # A transcript that does not fit into its frames has an infinite loss, which must not reach the weights.
        config.ctc_zero_infinity = True
        if tokenizer.pad_token_id != config.pad_token_id:
            blanks = f"token {tokenizer.pad_token_id}, the model's {config.pad_token_id}"
            raise ModelError(f"model.name: the tokenizer's blank is {blanks}")
    elif getattr(model.generation_config, "is_multilingual", False):
        if section.language is None:
            raise ConfigError("data.language: missing; a multilingual recogniser is asked for one, such as en or de")
        try:
            tokenizer.set_prefix_tokens(language=code_of(section.language), task="transcribe")
        except ValueError as error:
            raise ConfigError(f"data.language: {' '.join(str(error).split())[:200]}") from error
        model.generation_config.language = code_of(section.language)
        model.generation_config.task = "transcribe"
        model.generation_config.forced_decoder_ids = None
    if len(tokenizer) > config.vocab_size:
        raise ModelError(f"model.name: the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}")


@dataclass
class _Chooser:
    """Takes what can be used, and counts the rest by its reason."""

    section: DataSection
    model: nn.Module
    processor: Any
    kind: Kind
    left_out: Counter[str]
    kept_bytes: int = 0
    undecoded: str | None = None
    seen: int = 0
    cut: bool = False

    def __call__(self, part: Dataset) -> list[Clip]:
        if isinstance(part.features["audio"], Audio):
            part = part.cast_column("audio", Audio(decode=False))
        path = Path(self.section.name).expanduser()
        base = path.parent if path.is_file() else path if path.is_dir() else Path()
        found = []
        for number, row in enumerate(part):
            audio = row["audio"]
            path = audio.get("path") if isinstance(audio, dict) else audio
            clip = Clip(audio, base, path if isinstance(path, str) else f"recording {number}")
            captions = [Caption(**caption) for caption in row.get("captions") or ()]
            found += self._usable(clip, row["text"], captions)
        return found

    def _usable(self, clip: Clip, text: str | None, captions: list[Caption]) -> list[Clip]:
        """A recording, or the clips that a long one with captions is cut into."""
        reason = self._reason_of_text(clip, text)
        if reason is None:
            try:
                seconds = self._seconds(clip)
                if seconds > self._most_seconds() and captions:
                    return self._clips(clip, seconds, captions)
                reason = self._reason_of_length(clip, seconds)
            except DataError:
                self.undecoded = self.undecoded or clip.name
                reason = f"that can't be decoded (the first: '{self.undecoded}')"
        return [clip] if self._counted(reason) else []

    def _clips(self, recording: Clip, seconds: float, captions: list[Caption]) -> list[Clip]:
        """What of a long recording can be used. While there is room for the clips, it is decoded, once."""
        rate, most = self.processor.feature_extractor.sampling_rate, self._most_seconds()
        parts, samples = joined(captions, most), None
        if self.kept_bytes + 4 * rate * sum(part.stop - part.start for part in parts) <= KEPT_BYTES:
            samples = recording.read(rate)
            seconds = len(samples) / rate
        self.cut = True
        found = []
        for part in parts:
            clip = replace(recording, samples=None, start=part.start, stop=min(part.stop, seconds))
            length = clip.stop - clip.start
            if length * rate < 2:
                reason = "whose caption lies outside of its recording"
            elif length > most:
                reason = f"whose caption is longer than {most:g} s"
            else:
                reason = self._reason_of_text(clip, part.text) or self._reason_of_length(clip, length)
            if self._counted(reason):
                found.append(clip)
                if samples is not None:
                    clip.samples = clip.part_of(samples, rate)
                    self.kept_bytes += clip.samples.nbytes
        return found

    def _counted(self, reason: str | None) -> bool:
        """Whether something can be used, which it can without a reason why not."""
        self.seen += 1
        if reason is not None:
            self.left_out[reason] += 1
        return reason is None

    def _reason_of_text(self, clip: Clip, text: str | None) -> str | None:
        """Why a text can't be used; None for one that can, whose tokens are the clip's labels then."""
        if not text or not text.strip():
            return "without a text"
        clip.labels = self._labels(text)
        if not normaliser(self.section.language)(texts_of(self.processor, [clip.labels], labels=True)[0]):
            return "with a text of which no word is left"
        return None

    def _seconds(self, clip: Clip) -> float:
        """A recording's length. While there is room it is decoded, which proves that it can be, and kept."""
        rate = self.processor.feature_extractor.sampling_rate
        seconds = clip.seconds()
        if seconds <= self._most_seconds() and self.kept_bytes + 4 * seconds * rate <= KEPT_BYTES:
            clip.samples = clip.read(rate)
            self.kept_bytes += clip.samples.nbytes
            return len(clip.samples) / rate
        return seconds

    def _most_seconds(self) -> float:
        heard = getattr(self.processor.feature_extractor, "chunk_length", None)
        return min(self.section.max_seconds, heard) if self.kind == "seq2seq" and heard else self.section.max_seconds

    def _reason_of_length(self, clip: Clip, seconds: float) -> str | None:
        config, labels = self.model.config, clip.labels
        if seconds > self._most_seconds():
            clip.samples = None
            return f"longer than {self._most_seconds():g} s"
        if self.kind == "seq2seq":
            most = getattr(config, "max_target_positions", None)
            return f"with a text of more than {most} tokens" if most and len(labels) > most else None
        frames = frames_of(self.model, round(seconds * self.processor.feature_extractor.sampling_rate))
        # A blank stands between two letters that are alike.
        needed = len(labels) + sum(one == other for one, other in zip(labels, labels[1:], strict=False))
        masked = (
            config.mask_time_length if getattr(config, "apply_spec_augment", False) and config.mask_time_prob else 0
        )
        return "too short for the model or their text" if frames < max(needed, masked, 1) else None

    def _labels(self, text: str) -> list[int]:
        tokenizer = self.processor.tokenizer
        if isinstance(tokenizer, Wav2Vec2CTCTokenizer):
            text = writable(text, tokenizer)
        return tokenizer(text).input_ids


def writable(text: str, tokenizer: Wav2Vec2CTCTokenizer) -> str:
    """A text as a tokenizer of letters can write it: in the case that it knows, without what it has no letter for."""
    letters = [token for token in tokenizer.get_vocab() if len(token) == 1]
    upper, lower = any(letter.isupper() for letter in letters), any(letter.islower() for letter in letters)
    text = text.upper() if upper and not lower else text.lower() if lower and not upper else text
    known = {*letters, " "}
    return " ".join("".join(letter if letter in known else " " * letter.isspace() for letter in text).split())
