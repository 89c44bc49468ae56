"""Synthesis: speech of a stated voice, speed and pitch, by the espeak-ng library that a Python package ships."""

from __future__ import annotations

import _ctypes
import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from hfprune.errors import ConfigError
from hfprune.speech.audio import resampled
from hfprune.speech.needs import needed

SLOWEST, NORMAL, FASTEST = 80, 175, 450
"""Words a minute that espeak-ng takes, and its own choice."""

_SYNCHRONOUS, _DO_NOT_EXIT, _UTF8, _CHARACTERS = 2, 0x8000, 1, 1
_SPEED, _PITCH = 1, 3
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

# The library holds one state for the whole process.
_lock = threading.Lock()


def synthesise(text: str, voice: str = "en-us", speed: int = NORMAL, pitch: int = 50) -> np.ndarray:
    """A text spoken; the same arguments give the same samples.

    Source: espeak-ng 1.52, a formant synthesiser; its C interface `speak_lib.h`.

    Args:
        text: in the voice's language.
        voice: a language of espeak-ng, also with a variant: `en-us`, `de+m3`, `es+f2`.
        speed: words a minute, 80 to 450.
        pitch: 0 to 100; 50 is the voice's own.

    Returns:
        float32 samples (samples,) at 16 kHz, within -1 and 1.

    Raises:
        ConfigError: the library is missing, the voice, speed or pitch is none of its own, or the text holds nothing
            that it can say.
    """
    if not SLOWEST <= speed <= FASTEST:
        raise ConfigError(f"speed: must be between {SLOWEST} and {FASTEST} words a minute, not {speed}")
    if not 0 <= pitch <= 100:
        raise ConfigError(f"pitch: must be between 0 and 100, not {pitch}")
    heard: list[np.ndarray] = []

    @_CALLBACK
    def hear(samples: ctypes._Pointer, count: int, events: int) -> int:
        if samples and count > 0:
            heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    with _fresh_library() as (library, rate):
        _choose(library, voice)
        library.espeak_SetParameter(_SPEED, speed, 0)
        library.espeak_SetParameter(_PITCH, pitch, 0)
        library.espeak_SetSynthCallback(hear)
        spoken = text.encode() + b"\0"
        library.espeak_Synth(spoken, len(spoken), 0, _CHARACTERS, 0, _UTF8, None, None)
        library.espeak_Synchronize()
    samples = np.concatenate(heard) if heard else np.zeros(0, np.int16)
    if not samples.any():
        raise ConfigError(f"espeak-ng has nothing to say to '{text}'")
    return np.clip(resampled(samples.astype(np.float32) / 32768, rate), -1.0, 1.0)


@contextmanager
def _fresh_library() -> Iterator[tuple[ctypes.CDLL, int]]:
    """The library as if nothing had been said before, and the rate of its samples.

    What it has said leaves traces in its variables (phases, random numbers), which nothing but loading it anew clears:
    5 ms.
    """
    loader = needed("espeakng_loader")
    with _lock:
        try:
            library = ctypes.CDLL(str(loader.get_library_path()))
        except OSError as error:
            raise ConfigError(f"espeak-ng can't be loaded: {error}") from error
        try:
            # text, bytes, position and its type, end, flags, identifier, data of the caller's
            library.espeak_Synth.argtypes = [
                *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint),
                *(ctypes.c_void_p, ctypes.c_void_p),
            ]
            data = str(_data_path())
            rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data.encode(), _DO_NOT_EXIT)
            if rate <= 0:
                raise ConfigError(f"espeak-ng finds no voices in '{data}'")
            library.espeak_ng_SetRandSeed(ctypes.c_long(1))
            try:
                yield library, rate
            finally:
                library.espeak_Terminate()
        finally:
            close = getattr(_ctypes, "dlclose", None) or _ctypes.FreeLibrary
            close(library._handle)


def _choose(library: ctypes.CDLL, voice: str) -> None:
    """Sets the voice. Of a variant that does not exist the library takes no notice."""
    _, _, variant = voice.partition("+")
    known = not variant or (_data_path() / "voices" / "!v" / variant).is_file()
    if not known or library.espeak_SetVoiceByName(voice.encode()):
        raise ConfigError(f"voice: espeak-ng knows no '{voice}'; it knows e.g. en, en-us+f3, de, es-419+m2")


def _data_path() -> Path:
    return Path(needed("espeakng_loader").get_data_path())
