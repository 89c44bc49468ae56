"""Made speech: the same every time, every condition on the same utterances, longer recordings too."""

from collections import Counter

import numpy as np

from hfprune.speech.audio import RATE, loudness
from hfprune.speech.corpus import NEW_VOICES, VOICES, WORDS, training_set, wild_set
from hfprune.speech.synthesis import synthesise
from hfprune.study import Study

SMALL = Study(train=9, held_out=3, test=2, long=1, long_seconds=4.0)


def test_training_recordings():
    made = list(training_set(SMALL))
    assert Counter(each.split for each in made) == {"train": 9, "test": 3}
    assert Counter(each.language for each in made) == {"en": 4, "de": 4, "es": 4}
    assert all(set(each.text.split()) <= set(WORDS[each.language].split()) for each in made)
    assert len({each.text for each in made}) == len(made)
    again = list(training_set(SMALL))
    assert all(np.array_equal(one.samples, other.samples) for one, other in zip(made, again, strict=True))
    assert made[0].text != next(training_set(SMALL.model_copy(update={"seed": 1}))).text


def test_conditions_cross_languages_on_the_same_utterances():
    made = list(wild_set(SMALL))
    levels = sum(len(each) for each in SMALL.conditions.values())
    assert len(made) == 3 * (2 * (1 + levels) + 1) and len({each.name for each in made}) == len(made)
    for language in ("en", "de", "es"):
        mine = [each for each in made if each.language == language]
        assert {each.category for each in mine} == {"clean", "long", *SMALL.conditions}
        texts = Counter(each.text for each in mine if each.category != "long")
        assert set(texts.values()) == {1 + levels}
        long = next(each for each in mine if each.category == "long")
        assert len(long.samples) >= 4.0 * RATE and len(long.text.split()) > 5
    row = next(each for each in made if each.name == "de-01-noise-1").row()
    assert row["file_name"] == "de-01-noise-1.wav" and row["language"] == "de" and row["category"] == "noise"
    assert "samples" not in row
    assert row["conditions"] == {"condition": "noise 10 dB", "voice": "de+f2", "rate": "175 words/min"}


def test_only_loudness_changes_loudness():
    for each in wild_set(SMALL.model_copy(update={"languages": ["es"], "long": 0})):
        expected = -50 if each.category == "loudness" else -26
        assert abs(loudness(each.samples) - expected) < (1 if each.category == "speed" else 0.1), each.name


def test_every_voice_is_one_of_the_synthesiser():
    for language in WORDS:
        assert not set(VOICES[language]) & set(NEW_VOICES[language])
        for voice in [*VOICES[language], *NEW_VOICES[language]]:
            assert len(synthesise(WORDS[language].split()[0], voice))
