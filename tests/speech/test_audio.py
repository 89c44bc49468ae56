"""Sound of any rate and channels as one channel of one rate; captions of every kind as text."""

import numpy as np
import pytest
from scipy.io import wavfile

from hfprune.errors import DataError
from hfprune.speech.audio import loudness, read_audio, resampled, write_audio
from hfprune.speech.captions import captions_of, read_captions, text_of


def tone(rate, seconds=0.5, hertz=440.0):
    return np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate).astype(np.float32) * 0.5


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_rate_and_channels(rate, channels, tmp_path):
    wavfile.write(tmp_path / "tone.wav", rate, np.stack([tone(rate)] * channels, axis=1))
    heard = read_audio(tmp_path / "tone.wav")
    assert heard.dtype == np.float32 and heard.ndim == 1 and abs(len(heard) - 8_000) <= 32
    assert np.argmax(np.abs(np.fft.rfft(heard))) / (len(heard) / 16_000) == pytest.approx(440, abs=3)
    assert loudness(heard) == pytest.approx(-9.03, abs=0.2)  # a sine of half of full scale
    assert np.array_equal(read_audio((tmp_path / "tone.wav").read_bytes()), heard)


def test_written_and_read_again(tmp_path):
    write_audio(tmp_path / "tone.wav", tone(16_000))
    assert np.abs(read_audio(tmp_path / "tone.wav") - tone(16_000)).max() < 1e-4
    assert len(resampled(tone(8_000), 8_000)) == 8_000


def test_silence_is_infinitely_quiet():
    assert loudness(np.zeros(10, np.float32)) == float("-inf") == loudness(np.zeros(0, np.float32))


def test_what_can_not_be_decoded(tmp_path):
    (tmp_path / "not.wav").write_bytes(b"no sound at all" * 20)
    for source in (tmp_path / "not.wav", tmp_path / "nothing.wav", b"RIFF"):
        with pytest.raises(DataError, match="^'[^']*' can't be decoded: [A-Z][a-z ]*$"):
            read_audio(source)


SRT = "1\n00:00:01,000 --> 00:00:02,500\n<i>Hello</i>\nthere\n\n2\n00:00:02,500 --> 00:00:04,000\nworld\n"
VTT = (
    "WEBVTT\n\n00:00:01.000 --> 00:00:02.500 align:start\nHello <c>there</c>\n\n00:00:02.500 --> 00:00:04.000\nworld\n"
)


@pytest.mark.parametrize(("kind", "text"), [("srt", SRT), ("vtt", VTT)])
def test_captions(kind, text, tmp_path):
    (tmp_path / f"a.{kind}").write_text("\ufeff" + text, encoding="utf-8")
    found = read_captions(tmp_path / f"a.{kind}")
    assert [(c.start, c.stop, c.text) for c in found] == [(1.0, 2.5, "Hello there"), (2.5, 4.0, "world")]
    assert text_of(found) == "Hello there world"


def test_a_plain_text_and_lines_that_repeat(tmp_path):
    assert text_of(captions_of("Hello \n world", "txt")) == "Hello world"
    assert text_of([*captions_of("a", "txt"), *captions_of("a", "txt"), *captions_of("b", "txt")]) == "a b"


@pytest.mark.parametrize(("kind", "text"), [("srt", ""), ("vtt", "WEBVTT\n"), ("txt", " \n"), ("srt", "no times")])
def test_captions_without_a_word(kind, text, tmp_path):
    (tmp_path / f"a.{kind}").write_text(text)
    with pytest.raises(DataError, match="holds no text|is not"):
        read_captions(tmp_path / f"a.{kind}")
    with pytest.raises(DataError, match="can't be read"):
        read_captions(tmp_path / f"none.{kind}")
