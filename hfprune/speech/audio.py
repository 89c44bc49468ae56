"""Sound as recognisers hear it: one channel of floating-point samples at one rate, from any file that FFmpeg reads."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from hfprune.errors import DataError
from hfprune.speech.needs import needed

RATE = 16_000
"""Samples a second, as Whisper, Wav2Vec2 and HuBERT take them."""


def read_audio(source: str | Path | bytes, rate: int = RATE, name: str = "") -> np.ndarray:
    """Decodes and resamples; of several channels the mean is taken.

    Args:
        source: a file of sound or video, or what such a file holds.
        rate: samples a second.
        name: how a message calls it; by default the file's path.

    Returns:
        float32 samples (samples,), within -1 and 1.

    Raises:
        DataError: it can't be decoded, or holds no sound.
    """
    av = needed("av")
    name = name or ("audio" if isinstance(source, bytes) else str(source))
    opened = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    parts = []
    try:
        with av.open(opened) as container:
            if not container.streams.audio:
                raise DataError(f"'{name}' holds no sound")
            resampler = av.AudioResampler(format="fltp", rate=rate)
            for frame in container.decode(audio=0):
                parts += [part.to_ndarray().mean(axis=0) for part in resampler.resample(frame)]
            parts += [part.to_ndarray().mean(axis=0) for part in resampler.resample(None)]
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"'{name}' can't be decoded: {error.strerror or error}") from error
    samples = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    if not len(samples):
        raise DataError(f"'{name}' holds no sound")
    return samples.astype(np.float32, copy=False)


def seconds_of(source: str | Path | bytes, name: str = "") -> float:
    """How long it sounds, by what the file says of itself; it is decoded only where it says nothing.

    Raises:
        DataError: it can't be opened, or holds no sound.
    """
    av = needed("av")
    name = name or ("audio" if isinstance(source, bytes) else str(source))
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
            if not container.streams.audio:
                raise DataError(f"'{name}' holds no sound")
            stream = container.streams.audio[0]
            if stream.duration is not None:
                return float(stream.duration * stream.time_base)
            if container.duration is not None:
                return container.duration / av.time_base
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"'{name}' can't be decoded: {error.strerror or error}") from error
    return len(read_audio(source, name=name)) / RATE


def resampled(samples: np.ndarray, rate: int, to: int = RATE) -> np.ndarray:
    """Samples (samples,) of one rate at another one, by a polyphase filter."""
    if rate == to:
        return samples.astype(np.float32, copy=False)
    from math import gcd

    from scipy.signal import resample_poly

    common = gcd(rate, to)
    return resample_poly(samples, to // common, rate // common).astype(np.float32)


def write_audio(path: Path, samples: np.ndarray, rate: int = RATE) -> None:
    """Writes samples (samples,) as a WAV file of 16 bits; what is louder than 1 is cut off."""
    from scipy.io import wavfile

    wavfile.write(path, rate, (np.clip(samples, -1.0, 1.0) * 32767).astype(np.int16))


def loudness(samples: np.ndarray) -> float:
    """The root mean square of samples, in decibels below full scale; minus infinity for silence."""
    power = float(np.mean(np.square(samples, dtype=np.float64))) if len(samples) else 0.0
    return 10 * float(np.log10(power)) if power > 0 else float("-inf")
