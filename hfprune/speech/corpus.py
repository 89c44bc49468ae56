"""Corpus: made speech of a small closed vocabulary, to train a small recogniser on and to test it under conditions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hfprune.speech.audio import RATE
from hfprune.speech.conditions import at_loudness, changed
from hfprune.speech.synthesis import synthesise
from hfprune.study import Study, level_words

# No numbers: Whisper's English rules write them as digits, and several together as one.
WORDS = {
    "en": "red green blue white black yellow dog cat bird horse fish tree house water open close left right up down "
    "stop start light music",
    "de": "rot grün blau weiß schwarz gelb hund katze vogel pferd fisch baum haus wasser öffne schließe links rechts "
    "hoch runter halt weiter licht musik",
    "es": "rojo verde azul blanco negro amarillo perro gato pájaro caballo pez árbol casa agua abre cierra izquierda "
    "derecha arriba abajo para sigue luz música",
}
"""What is said, by language: words in any order."""
VOICES = {
    "en": ["en-us", "en-us+f3", "en-us+m3", "en"],
    "de": ["de", "de+f2", "de+m3", "de+f4"],
    "es": ["es", "es+f3", "es+m2", "es-419"],
}
NEW_VOICES = {
    "en": ["en-gb-scotland", "en-us+f5", "en-029+m7"],
    "de": ["de+m7", "de+f5", "de+m5"],
    "es": ["es-419+f5", "es+m7", "es+f2"],
}
"""Voices that are not trained on, of other accents too."""
RATES = (150, 175, 200)
LOUDNESS = -26.0
"""In decibels below full scale, where no condition says another."""
PAUSE = 0.5
"""Seconds of silence between the utterances of a long recording."""

_TRAIN, _HELD_OUT, _TEST, _LONG, _BABBLE, _CONDITION = range(6)


@dataclass(frozen=True)
class Utterance:
    """What is said, and by whom.

    Attributes:
        text: words of `WORDS`.
        language: `en`, `de` or `es`.
        voice: of espeak-ng.
        rate: words a minute.
        pitch: 0 to 100.
    """

    text: str
    language: str
    voice: str
    rate: int
    pitch: int

    def spoken(self) -> np.ndarray:
        """float32 samples (samples,) at 16 kHz."""
        return at_loudness(synthesise(self.text, self.voice, self.rate, self.pitch), LOUDNESS)


@dataclass(frozen=True)
class Made:
    """A recording that was made.

    Attributes:
        name: of its file, without the ending.
        samples: (samples,) at 16 kHz.
        text, language: what is said.
        category: the condition.
        conditions: how it was made.
        split: `train` or `test`; None in a test set.
    """

    name: str
    samples: np.ndarray
    text: str
    language: str
    category: str = "clean"
    conditions: dict[str, str] = field(default_factory=dict)
    split: str | None = None

    def row(self) -> dict[str, Any]:
        """Its line of `metadata.jsonl`."""
        values = {"file_name": f"{self.name}.wav", "title": self.name} | self.__dict__
        return {key: value for key, value in values.items() if key not in ("name", "samples") and value is not None}


def utterance(random: np.random.Generator, language: str, voice: str | None = None) -> Utterance:
    """Two to five words; by one of the voices that are trained on, where none is named."""
    words = random.choice(WORDS[language].split(), size=random.integers(2, 6))
    voice = voice or str(random.choice(VOICES[language]))
    return Utterance(" ".join(words), language, voice, int(random.choice(RATES)), int(random.integers(40, 61)))


def training_set(study: Study) -> Iterator[Made]:
    """The recordings to train on, some of them lightly changed, and the clean ones held out; the same every time."""
    for split, part, count in (("train", _TRAIN, study.train), ("test", _HELD_OUT, study.held_out)):
        for index in range(count):
            random = _random(study, part, index)
            said = utterance(random, study.languages[index % len(study.languages)])
            samples = said.spoken()
            if split == "train" and random.random() < study.augmented:
                samples = _lightly_changed(samples, random)
            yield Made(f"{split}-{index:05}", samples, said.text, said.language, split=split)


def wild_set(study: Study) -> Iterator[Made]:
    """The recordings of the test: the same utterances as they are and under every condition and level, one at a time;
    then the longer ones. The same every time."""
    crowd = [utterance(_random(study, _BABBLE, n), study.languages[n % len(study.languages)]) for n in range(6)]
    voices = [said.spoken() for said in crowd]
    for language in study.languages:
        for index in range(study.test):
            order = study.languages.index(language) * study.test + index
            said = utterance(_random(study, _TEST, order), language, VOICES[language][index % len(VOICES[language])])
            yield _made(f"{language}-{index:02}-clean", said.spoken(), said)
            for kind, levels in study.conditions.items():
                for number, level in enumerate(levels):
                    yield _under(study, said, kind, level, f"{language}-{index:02}-{kind}-{number}", order, voices)
        for index in range(study.long):
            yield _long(study, language, index)


def _under(
    study: Study, said: Utterance, kind: str, level: Any, name: str, order: int, voices: list[np.ndarray]
) -> Made:
    """An utterance under a condition."""
    if kind == "rate":
        said = replace(said, rate=round(level))
    elif kind == "voice":
        new = NEW_VOICES[said.language]
        said = replace(said, voice=new[order % len(new)])
    samples = said.spoken()
    if kind not in ("rate", "voice"):
        samples = changed(samples, kind, level, _random(study, _CONDITION, order), voices)
    return _made(name, samples, said, kind, f"{kind} {level_words(kind, level)}")


def _made(name: str, samples: np.ndarray, said: Utterance, category: str = "clean", condition: str = "clean") -> Made:
    how = {"condition": condition, "voice": said.voice, "rate": level_words("rate", said.rate)}
    return Made(name, samples, said.text, said.language, category, how)


def _long(study: Study, language: str, index: int) -> Made:
    """Utterances of one voice with pauses, at least as long as the study says."""
    random = _random(study, _LONG, study.languages.index(language) * study.long + index)
    voice = VOICES[language][index % len(VOICES[language])]
    parts, texts, seconds = [], [], 0.0
    while seconds < study.long_seconds:
        said = utterance(random, language, voice)
        texts.append(said.text)
        parts += [said.spoken(), np.zeros(int(PAUSE * RATE), np.float32)]
        seconds += sum(len(part) for part in parts[-2:]) / RATE
    samples = np.concatenate(parts)
    how = {"condition": "long", "voice": voice, "rate": "several"}
    return Made(f"{language}-long-{index:02}", samples, " ".join(texts), language, "long", how)


def _lightly_changed(samples: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Light noise, a small room, or a little faster or slower."""
    kind = str(random.choice(["noise", "reverberation", "speed"]))
    low, high = {"noise": (20.0, 30.0), "reverberation": (0.1, 0.2), "speed": (0.95, 1.05)}[kind]
    return changed(samples, kind, float(random.uniform(low, high)), random)


def _random(study: Study, part: int, index: int) -> np.random.Generator:
    return np.random.default_rng([study.seed, part, index])
