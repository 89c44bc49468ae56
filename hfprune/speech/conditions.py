"""Conditions: what happens to speech between a mouth and a recogniser, at stated levels and one at a time.

Whatever does not say otherwise keeps the loudness, so that nothing but its own effect is heard.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from hfprune.speech.audio import RATE, loudness, resampled
from hfprune.study import Level, band_of


def with_noise(samples: np.ndarray, noise: np.ndarray, ratio: float) -> np.ndarray:
    """Adds noise (samples,) at a signal-to-noise ratio in decibels, exact over the whole recording."""
    gain = np.sqrt(_power(samples) / _power(noise) / 10 ** (ratio / 10))
    return _as_loud(samples + gain * noise[: len(samples)], samples)


def white_noise(count: int, random: np.random.Generator) -> np.ndarray:
    """Gaussian noise (count,), alike at all frequencies."""
    return random.standard_normal(count)


def babble(count: int, voices: Sequence[np.ndarray], random: np.random.Generator) -> np.ndarray:
    """Many speaking at once (count,): other recordings, equally loud, repeated and each begun somewhere."""
    mixed = np.zeros(count)
    for voice in voices:
        said = np.resize(np.roll(voice, random.integers(len(voice))), count)
        mixed += said / np.sqrt(_power(said))
    return mixed


def reverberated(samples: np.ndarray, seconds: float, random: np.random.Generator, rate: int = RATE) -> np.ndarray:
    """In a room: the sound, and as strong noise behind it that decays by 60 dB in the time stated.

    Source: Polack's model of a room's response, exponentially decaying Gaussian noise; RT60 as in Schroeder 1965.

    Args:
        samples: (samples,).
        seconds: RT60.
        random: makes the room.
        rate: samples a second.
    """
    from scipy.signal import fftconvolve

    count = max(2, int(1.2 * seconds * rate))
    room = random.standard_normal(count) * 10 ** (-3 * np.arange(count) / (seconds * rate))
    room[0] = 0.0
    room /= np.sqrt(np.sum(room**2))
    room[0] = 1.0
    return _as_loud(fftconvolve(samples, room)[: len(samples)], samples)


def band_limited(samples: np.ndarray, low: float | None, high: float | None, rate: int = RATE) -> np.ndarray:
    """Only frequencies between two in hertz; None leaves a side open. Its edges are 6 dB down, without delay."""
    from scipy.signal import butter, sosfiltfilt

    edges, kind = ([low, high], "band") if low and high else (low or high, "high" if low else "low")
    return _as_loud(sosfiltfilt(butter(8, edges, kind, fs=rate, output="sos"), samples), samples)


def sped(samples: np.ndarray, factor: float) -> np.ndarray:
    """As many times as fast, and as high, as a tape that runs faster."""
    share = Fraction(factor).limit_denominator(100)
    return resampled(samples, share.numerator, share.denominator)


def at_loudness(samples: np.ndarray, level: float) -> np.ndarray:
    """As loud as stated, in decibels below full scale (`hfprune.speech.audio.loudness`); silence stays silent."""
    now = loudness(samples)
    return samples if np.isinf(now) else (samples * 10 ** ((level - now) / 20)).astype(np.float32)


def changed(
    samples: np.ndarray, kind: str, level: Level | None, random: np.random.Generator, others: Sequence[np.ndarray] = ()
) -> np.ndarray:
    """Speech under a condition (`hfprune.study.LEVELS`); of one that is said, not added, as it is.

    Args:
        samples: (samples,), at 16 kHz.
        kind, level: as `hfprune.study.fits` accepts them.
        random: makes noise and rooms.
        others: the voices of babble.

    Returns:
        float32 samples (samples,); after `speed` as many more or fewer.
    """
    match kind:
        case "noise":
            return with_noise(samples, white_noise(len(samples), random), level)
        case "babble":
            return with_noise(samples, babble(len(samples), others, random), level)
        case "reverberation":
            return reverberated(samples, level, random)
        case "band":
            return band_limited(samples, *band_of(level))
        case "speed":
            return sped(samples, level)
        case "loudness":
            return at_loudness(samples, level)
    return samples


def _power(samples: np.ndarray) -> float:
    return float(np.mean(np.square(samples, dtype=np.float64)))


def _as_loud(samples: np.ndarray, model: np.ndarray) -> np.ndarray:
    return at_loudness(samples.astype(np.float32), loudness(model))
