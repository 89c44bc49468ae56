"""Speech by espeak-ng: the same for the same arguments, another one for others; bad ones in one line."""

import sys

import numpy as np
import pytest

from hfprune.errors import ConfigError
from hfprune.speech.synthesis import synthesise


def test_the_same_arguments_give_the_same_samples():
    first = synthesise("katze links", "de+m3", 160, 45)
    synthesise("hola", "es")
    assert np.array_equal(first, synthesise("katze links", "de+m3", 160, 45))
    assert first.dtype == np.float32 and first.ndim == 1 and 0.1 < np.abs(first).max() <= 1
    assert 0.4 < len(first) / 16_000 < 1.5


def test_voice_speed_and_pitch_are_heard():
    said = synthesise("water", "en-us")
    for other in (synthesise("water", "en-us+f3"), synthesise("water", "de"), synthesise("water", "en-us", pitch=90)):
        assert len(other) != len(said) or np.abs(other - said).max() > 0.01
    assert len(synthesise("water", "en-us", 90)) > 1.5 * len(synthesise("water", "en-us", 300))


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"voice": "en-us+nobody"}, "voice: espeak-ng knows no 'en-us.nobody'"),
        ({"voice": "xx"}, "voice: espeak-ng knows no 'xx'"),
        ({"speed": 20}, "speed: must be between 80 and 450"),
        ({"pitch": 101}, "pitch: must be between 0 and 100"),
        ({"text": " "}, "nothing to say"),
    ],
)
def test_bad_arguments_are_one_line(wrong, line):
    with pytest.raises(ConfigError, match=line):
        synthesise(**{"text": "cat", **wrong})
    assert len(synthesise("cat"))  # the library is as it was


def test_a_missing_library_is_one_line(monkeypatch, tmp_path):
    import espeakng_loader

    monkeypatch.setattr(espeakng_loader, "get_library_path", lambda: str(tmp_path / "libespeak-ng.so"))
    with pytest.raises(ConfigError, match="espeak-ng can't be loaded"):
        synthesise("cat")
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ConfigError, match=r"speech needs 'espeakng_loader': pip install 'hfprune\[speech\]'"):
        synthesise("cat")
