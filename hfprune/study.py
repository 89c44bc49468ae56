"""Study: what speech a study in the wild makes, under which conditions, and how much it prunes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from hfprune.registry import did_you_mean
from hfprune.strict import StrictModel

Level = float | str | list[float]
Count = Annotated[int, Field(ge=1, le=100_000)]

TELEPHONE = (300.0, 3400.0)
"""The band of a telephone, in hertz."""
LANGUAGES = ("en", "de", "es")

LEVELS = {
    "noise": "a signal-to-noise ratio in dB, -20 to 60",
    "babble": "a signal-to-noise ratio in dB, -20 to 60",
    "reverberation": "an RT60 in seconds, 0.05 to 5",
    "band": "telephone, a highest frequency in Hz, or [lowest, highest], 50 to 7900",
    "speed": "a factor, 0.5 to 2",
    "loudness": "dB below full scale, -70 to 0",
    "rate": "words a minute, 80 to 450",
    "voice": "new, for voices that are not trained on",
}
"""Conditions, and what their levels are. `speed` plays faster and higher; `rate` is that of the speaker."""
_RANGES = {
    "noise": (-20.0, 60.0),
    "babble": (-20.0, 60.0),
    "reverberation": (0.05, 5.0),
    "speed": (0.5, 2.0),
    "loudness": (-70.0, 0.0),
    "rate": (80.0, 450.0),
}


class Study(StrictModel):
    """The recipe's `wild:` section: `hfprune wild study` makes speech as it says, trains the recipe's recogniser on it,
    prunes it at every ratio, and tests all of them under every condition.

    Attributes:
        languages: of `en`, `de`, `es`.
        train: utterances to train on, in all languages together.
        augmented: the fraction of them that are heard in light noise, in a small room or a little faster or slower.
        held_out: clean utterances on which the recipe's metric is measured.
        test: utterances of each language, the same ones under every condition; and as they are.
        conditions: levels by condition (`LEVELS`).
        long: longer recordings of each language, as they are.
        long_seconds: how long these are at least.
        ratios: the fractions that go of what the recipe's target measures.
        seed: of texts, voices, noises and rooms.
    """

    languages: Annotated[list[Literal[LANGUAGES]], Field(min_length=1)] = list(LANGUAGES)
    train: Count = 1500
    augmented: Annotated[float, Field(ge=0, le=1)] = 0.3
    held_out: Count = 120
    test: Count = 4
    conditions: dict[str, list[Level]] = Field(
        default_factory=lambda: {
            "noise": [20.0, 10.0, 5.0],
            "babble": [10.0, 5.0],
            "reverberation": [0.3, 0.6],
            "band": ["telephone", 2000.0],
            "speed": [0.85, 1.2],
            "loudness": [-50.0],
            "rate": [120.0, 260.0],
            "voice": ["new"],
        }
    )
    long: Annotated[int, Field(ge=0, le=1000)] = 3
    long_seconds: Annotated[float, Field(gt=1, le=600)] = 40.0
    ratios: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)] = [0.3, 0.5, 0.7]
    seed: Annotated[int, Field(ge=0)] = 0

    @field_validator("languages", "ratios")
    @classmethod
    def _once(cls, values: list[Any]) -> list[Any]:
        return list(dict.fromkeys(values))

    @field_validator("conditions")
    @classmethod
    def _known(cls, conditions: dict[str, list[Level]]) -> dict[str, list[Level]]:
        for kind, levels in conditions.items():
            if kind not in LEVELS:
                raise ValueError(f"unknown condition '{kind}'; {did_you_mean(kind, LEVELS)}")
            for level in levels:
                if not fits(kind, level):
                    raise ValueError(f"{kind}: {level!r} is no level of it; it takes {LEVELS[kind]}")
        return conditions


def fits(kind: str, level: Any) -> bool:
    """Whether a level is one of a condition's."""
    if kind == "voice":
        return level == "new"
    if kind == "band":
        low, high = band_of(level) or (None, 0.0)
        return (low is None or 50 <= low < high) and 50 <= high <= 7900
    low, high = _RANGES[kind]
    return isinstance(level, float) and low <= level <= high


def band_of(level: Any) -> tuple[float | None, float] | None:
    """The lowest and highest frequency of a level of `band`; None where it is none."""
    if level == "telephone":
        return TELEPHONE
    if isinstance(level, list):
        return (level[0], level[1]) if len(level) == 2 else None
    return (None, level) if isinstance(level, float) else None


def level_words(kind: str, level: Level) -> str:
    """A level as tables show it: `10 dB`, `0.6 s`, `300-3400 Hz`."""
    if kind == "band":
        low, high = band_of(level)
        return f"{low or 0:g}-{high:g} Hz"
    unit = {"noise": " dB", "babble": " dB", "reverberation": " s", "speed": "x", "loudness": " dBFS"}
    return "new" if kind == "voice" else f"{level:g}{unit.get(kind, ' words/min')}"
