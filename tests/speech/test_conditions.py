"""Conditions are what they say: the ratio of speech to noise, a room's decay, a band, a speed, a loudness."""

import numpy as np
import pytest

from hfprune.errors import ConfigError
from hfprune.recipe import Recipe
from hfprune.speech.audio import RATE, loudness
from hfprune.speech.conditions import at_loudness, babble, band_limited, changed, reverberated, with_noise
from hfprune.study import Study, level_words


def random(seed=0):
    return np.random.default_rng(seed)


def tones(*hertz, seconds=1.0):
    times = np.arange(int(RATE * seconds)) / RATE
    return np.sum([np.sin(2 * np.pi * each * times) for each in hertz], axis=0).astype(np.float32) * 0.05


def power(samples):
    return float(np.mean(np.square(samples, dtype=np.float64)))


def strength(samples, hertz):
    """How strong a tone is, in decibels."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return 20 * np.log10(spectrum[round(hertz * len(samples) / RATE)] + 1e-12)


@pytest.mark.parametrize("ratio", [20.0, 5.0, -5.0])
def test_noise_is_as_strong_as_stated(ratio):
    speech, noise = tones(440), random().standard_normal(RATE)
    heard = with_noise(speech, noise, ratio)
    share = np.linalg.lstsq(np.stack([speech, noise], axis=1), heard, rcond=None)[0]
    assert 10 * np.log10(power(share[0] * speech) / power(share[1] * noise)) == pytest.approx(ratio, abs=0.01)
    assert loudness(heard) == pytest.approx(loudness(speech), abs=0.01)


def test_white_noise_and_babble_by_name():
    speech, others = tones(440), [tones(200, seconds=0.3), 5 * tones(900, seconds=2.0)]
    for kind in ("noise", "babble"):
        heard = changed(speech, kind, 10.0, random(), others)
        gain = np.dot(heard, speech) / np.dot(speech, speech)
        rest = heard - gain * speech
        assert 10 * np.log10(power(gain * speech) / power(rest)) == pytest.approx(10, abs=0.5)
        assert np.array_equal(heard, changed(speech, kind, 10.0, random(), others))
        assert not np.array_equal(heard, changed(speech, kind, 10.0, random(1), others))
    crowd = babble(RATE, others, random())
    assert strength(crowd, 200) == pytest.approx(strength(crowd, 900), abs=3)  # all equally loud


@pytest.mark.parametrize("seconds", [0.2, 0.6])
def test_a_room_decays_by_60_db_in_the_time_stated(seconds):
    click = np.zeros(2 * RATE, np.float32)
    click[0] = 1.0
    room = reverberated(click, seconds, random())[1:]
    left = 10 * np.log10(np.cumsum(room[::-1] ** 2)[::-1] / np.sum(room**2) + 1e-12)  # Schroeder 1965
    times = np.flatnonzero((left < -5) & (left > -25)) / RATE
    slope = np.polyfit(times, left[(left < -5) & (left > -25)], 1)[0]
    assert -60 / slope == pytest.approx(seconds, rel=0.1)


@pytest.mark.parametrize(
    ("band", "kept", "gone"),
    [((300.0, 3400.0), (500, 3000), (100, 5000)), ((None, 2000.0), (100, 1500), (3000, 6000))],
)
def test_a_band_is_what_is_left(band, kept, gone):
    speech = tones(*kept, *gone)
    heard = band_limited(speech, *band)
    assert strength(heard, kept[0]) == pytest.approx(strength(heard, kept[1]), abs=1)
    assert max(strength(heard, each) for each in gone) < strength(heard, kept[0]) - 40


def test_speed_and_loudness():
    speech = tones(400)
    fast = changed(speech, "speed", 1.25, random())
    assert len(fast) == pytest.approx(RATE / 1.25, abs=2)
    assert np.argmax(np.abs(np.fft.rfft(fast))) / (len(fast) / RATE) == pytest.approx(500, abs=2)
    assert loudness(changed(speech, "loudness", -40.0, random())) == pytest.approx(-40, abs=0.01)
    assert not at_loudness(np.zeros(5, np.float32), -20).any()


def test_levels_in_words():
    said = [("noise", 10.0), ("reverberation", 0.6), ("band", "telephone"), ("band", 2000.0), ("speed", 1.2)]
    assert [level_words(*each) for each in said] == ["10 dB", "0.6 s", "300-3400 Hz", "0-2000 Hz", "1.2x"]
    assert [level_words("rate", 260.0), level_words("voice", "new")] == ["260 words/min", "new"]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"conditions": {"nose": [5.0]}}, "wild.conditions: unknown condition 'nose'; did you mean 'noise'?"),
        (
            {"conditions": {"band": ["telefon"]}},
            "wild.conditions.band: 'telefon' is no level of it; it takes telephone",
        ),
        ({"conditions": {"band": [[3400.0, 300.0]]}}, "wild.conditions.band: .* is no level"),
        ({"conditions": {"noise": [90.0]}}, "wild.conditions.noise: 90.0 is no level of it"),
        ({"ratios": [1.5]}, "wild.ratios.0: "),
        ({"languages": ["fr"]}, "wild.languages.0: .*'en', 'de' or 'es'"),
        ({"trian": 5}, "wild.trian: unknown key; did you mean 'train'?"),
    ],
)
def test_a_wrong_study_is_one_line(values, line):
    recipe = {
        "model": {"name": "x"},
        "data": {"name": "y"},
        "pruning": {"target": 0.5},
        "output": {"folder": "z"},
    }
    with pytest.raises(ConfigError, match=line):
        Recipe.parse(recipe | {"wild": values})
    assert Recipe.parse(recipe | {"wild": {}}).wild == Study()
