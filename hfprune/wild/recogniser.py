"""A recogniser, dense or pruned, on long recordings: transformers' own pipeline, in chunks and batches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoTokenizer, Wav2Vec2CTCTokenizer
from transformers.pipelines import AutomaticSpeechRecognitionPipeline

from hfprune.checkpoint.load import from_pretrained
from hfprune.checkpoint.metadata import read_config
from hfprune.errors import DataError, ModelError
from hfprune.hub.reach import first_line, folder_of, looks_like_path, missing_path
from hfprune.speech.audio import RATE, resampled
from hfprune.speech.normalise import code_of
from hfprune.speech.recognisers import kind_of_classes

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Transcription:
    """What a recogniser heard.

    Attributes:
        text: all of it.
        seconds: that it took.
        peak_memory: bytes that the process (on CUDA: its tensors) held at most meanwhile; None where it can't be told.
        segments: start and stop in seconds and text, where the model tells times; Whisper's are phrases, CTC's words.
    """

    text: str
    seconds: float
    peak_memory: int | None
    segments: list[tuple[float | None, float | None, str]] = field(default_factory=list)


class Recogniser:
    """A model of speech recognition with its tokenizer and feature extractor: CTC (Wav2Vec2, HuBERT) or an
    encoder-decoder (Whisper).

    Args:
        name: a folder, or `OWNER/NAME` on the Hub.
        device: where it runs; by default CUDA where there is one.
        batch_size: chunks at a time.
        chunk: seconds of a chunk; neighbours overlap by a third of it. Whisper takes no more than its own 30.
        beams: hypotheses that an encoder-decoder follows.

    Raises:
        ModelError: it is no recogniser, or something of it is missing.
        CheckpointError: it does not match its metadata.
        NotReachable: it lies on the Hub, and the Hub can't be reached.
    """

    def __init__(
        self, name: str, *, device: str | None = None, batch_size: int = 8, chunk: float = 30.0, beams: int = 1
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        options = {"dtype": torch.float32} if self.device.type == "cpu" else {}
        model, extractor, tokenizer = load_recogniser(name, **options)
        if tokenizer.pad_token is None:  # the pipeline's batches ask for one, though sound has none
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        self._pipeline = AutomaticSpeechRecognitionPipeline(
            model=model, feature_extractor=extractor, tokenizer=tokenizer, device=self.device
        )
        self.whisper = self._pipeline.type == "seq2seq_whisper"
        self.batch_size = batch_size
        self.chunk = min(chunk, extractor.chunk_length) if self.whisper else chunk
        self.beams = beams
        self._warm = False

    def transcribe(self, samples: np.ndarray, language: str | None = None) -> Transcription:
        """Writes down a recording.

        Args:
            samples: float32 (samples,) at 16,000 a second.
            language: what is spoken, for models of several languages; by default such a model finds out itself.

        Raises:
            DataError: the model does not know the language.
        """
        heard = resampled(samples, RATE, self._pipeline.feature_extractor.sampling_rate)
        options = self._options(language)
        if not self._warm:  # what is done once only, such as allocating buffers, is no part of the time
            self._pipeline(heard[: self._pipeline.feature_extractor.sampling_rate], **options)
            self._warm = True
        with _peak(self.device) as peak:
            begun = perf_counter()
            found = self._pipeline(heard, chunk_length_s=self.chunk, batch_size=self.batch_size, **options)
            seconds = perf_counter() - begun
        segments = [(*map(_seconds, piece["timestamp"]), piece["text"].strip()) for piece in found.get("chunks", [])]
        return Transcription(found["text"].strip(), seconds, peak.get("bytes"), segments)

    def _options(self, language: str | None) -> dict[str, Any]:
        """What the pipeline is asked for: times where the model tells them, and how it is to generate."""
        if self._pipeline.type == "ctc":
            timed = isinstance(self._pipeline.tokenizer, Wav2Vec2CTCTokenizer)
            return {"return_timestamps": "word"} if timed else {}
        generate: dict[str, Any] = {"num_beams": self.beams}
        options: dict[str, Any] = {"ignore_warning": True, "generate_kwargs": generate}
        if self.whisper:
            model = self._pipeline.model
            settings = model.generation_config
            options["return_timestamps"] = getattr(settings, "no_timestamps_token_id", None) is not None
            generate["max_new_tokens"] = max(1, model.config.max_target_positions - 8)
            known = getattr(settings, "lang_to_id", None) if getattr(settings, "is_multilingual", True) else None
            if known and (code := code_of(language)):
                if f"<|{code}|>" not in known:
                    raise DataError(f"the model does not know the language '{code}'")
                generate |= {"language": code, "task": "transcribe"}
        return options


def load_recogniser(name: str, **options: Any) -> tuple[Any, Any, Any]:
    """A recogniser, its feature extractor and its tokenizer.

    Args:
        name: a folder, or `OWNER/NAME` on the Hub.
        options: of `from_pretrained`.

    Raises:
        ModelError: it is no recogniser, or something of it is missing.
        CheckpointError: it does not match its metadata.
        NotReachable: it lies on the Hub, and the Hub can't be reached.
    """
    folder = folder_of(name)
    if not (folder / "config.json").is_file():
        raise ModelError(f"'{name}' is no checkpoint: {_why_none(name, folder)}")
    kind = (read_config(folder).get("architectures") or ["a model of no known class"])[0]
    if kind_of_classes({kind}) is None:
        raise ModelError(f"'{name}' is not a speech recogniser: it holds {kind}")
    model = from_pretrained(folder, **options)
    try:
        return model, AutoFeatureExtractor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    except BaseException as error:
        # A tokenizer.json of an unknown kind is a bare Exception.
        if type(error) is not Exception and not isinstance(error, OSError | ValueError | KeyError | TypeError):
            raise
        raise ModelError(f"'{name}' lacks its feature extractor or tokenizer: {first_line(error)}") from error


def _seconds(time: Any) -> float | None:
    return None if time is None else round(float(time), 3)


def _why_none(name: str, folder: Path) -> str:
    if folder.is_dir():
        return "it has no config.json"
    return f"no such folder; {missing_path(name)}" if looks_like_path(name) or "/" not in name else "no such folder"


@contextmanager
def _peak(device: torch.device) -> Iterator[dict[str, int]]:
    """What is held at most within the block, in bytes."""
    found: dict[str, int] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found["bytes"] = torch.cuda.max_memory_allocated(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew at what is held now
    yield found
    if (most := _resident_peak()) is not None:
        found["bytes"] = most


def _resident_peak() -> int | None:
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
