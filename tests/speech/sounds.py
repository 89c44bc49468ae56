"""Speech of a kind: every letter is a tone, words are apart."""

import numpy as np

from hfprune.speech.audio import RATE, write_audio

TONES = {"a": 400, "b": 900, "c": 2000}


def spoken(text, rate=RATE, seconds=0.06):
    """Samples (samples,) of a text of the letters a, b and c."""
    time = np.arange(int(rate * seconds)) / rate
    silence = np.zeros(len(time), np.float32)
    parts = [silence]
    for letter in text:
        parts += [0.4 * np.sin(2 * np.pi * TONES[letter] * time) if letter in TONES else silence, silence]
    return np.concatenate(parts).astype(np.float32)


def record(folder, count, seed=0):
    """A folder of so many recordings of one word each, with their transcripts beside them."""
    drawn = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        text = "".join(drawn.choice(list(TONES), 2))
        write_audio(folder / f"{number:03}.wav", spoken(text))
        (folder / f"{number:03}.txt").write_text(text)
    return folder
