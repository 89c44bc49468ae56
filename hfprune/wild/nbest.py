"""n-best lists of recordings: a recogniser hears each, and what it can't list has a reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hfprune.errors import DataError
from hfprune.hub.reach import missing_path
from hfprune.speech.audio import RATE, read_audio
from hfprune.speech.hypotheses import Fusion, Recogniser, recogniser
from hfprune.speech.nbest import NBest
from hfprune.speech.normalise import normaliser
from hfprune.speech.recordings import Recording, read_recordings
from hfprune.wild.recogniser import load_recogniser
from hfprune.wild.run import ITEM_ERRORS, reason_of

Tell = Callable[[int, int], None]
"""Told how many recordings of how many were heard."""


@dataclass(frozen=True)
class Processor:
    """What hears and reads for a model, as transformers' processors hold it."""

    feature_extractor: Any
    tokenizer: Any


class Lister:
    """Makes n-best lists of recordings, which are utterances: nothing is cut.

    Args:
        name: of a recogniser: a folder, or `OWNER/NAME` on the Hub.
        count: the most hypotheses of a list.
        width: of the beam, as `speech.hypotheses.recogniser` takes it.
        fusion: a language model that takes part; for CTC alone.
        most: seconds of a recording at most.

    Raises:
        HfpruneError: it can't be loaded or is no recogniser, or one that writes, with a language model.
    """

    def __init__(
        self, name: str, count: int = 16, width: int | None = None, fusion: Fusion | None = None, most: float = 30.0
    ):
        self.model, extractor, tokenizer = load_recogniser(name, dtype=torch.float32)
        if torch.cuda.is_available():
            self.model.cuda()
        self.processor = Processor(extractor, tokenizer)
        self.count, self.width, self.fusion, self.most = count, width, fusion, most
        self._for_language(None)

    def _for_language(self, language: str | None) -> Recogniser:
        return recogniser(self.model, self.processor, self.count, language, self.width, self.fusion)

    def list_of(self, one: Recording, language: str | None = None) -> NBest:
        """The list of a recording.

        Args:
            language: what is spoken, where the recording doesn't say it.

        Raises:
            DataError: it can't be decoded, is too long, or nothing says what is said in it.
            ModelError: a language that the recogniser doesn't know.
        """
        spoken = one.language or language
        if one.text is None:
            raise DataError("no transcript, neither beside it nor in a metadata.jsonl")
        if not normaliser(spoken)(one.text):
            raise DataError("no word in its transcript")
        samples = read_audio(one.path)
        if (seconds := len(samples) / RATE) > self.most:
            raise DataError(f"{seconds:.1f} s of sound, more than {self.most:g}")
        found = self._for_language(spoken)(samples)
        if not all(math.isfinite(each.score) for each in found):
            raise DataError("the recogniser's scores are no numbers")
        return NBest(" ".join(one.text.split()), found, spoken)

    def __call__(
        self, recordings: Sequence[Recording], language: str | None = None, tell: Tell | None = None
    ) -> Iterator[tuple[Recording, NBest | str]]:
        """Each recording with its list, or with the reason why there is none."""
        for number, one in enumerate(recordings, start=1):
            try:
                yield one, self.list_of(one, language)
            except ITEM_ERRORS as error:
                yield one, reason_of(error).replace(f"'{one.path}' ", "")
            if tell is not None:
                tell(number, len(recordings))


def recordings_in(folder: Path, language: str | None = None, limit: int | None = None) -> list[Recording]:
    """The recordings of a folder, as `read_recordings` finds them.

    Args:
        language: of transcripts in several languages that is preferred.
        limit: how many at most, in the order of their names.

    Raises:
        DataError: no such folder, none in it, or a table or transcript that can't be read.
    """
    if not folder.is_dir():
        raise DataError(f"no folder '{folder}'; {missing_path(str(folder))}")
    found = read_recordings(folder, language)[:limit]
    if not found:
        raise DataError(f"'{folder}' holds no recording")
    return found
