"""What a recogniser is given and measured by: the sound of an item and its reference, from wherever they lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hfprune.errors import DataError
from hfprune.speech.audio import RATE, loudness, read_audio
from hfprune.speech.normalise import code_of, normaliser
from hfprune.wild import folder
from hfprune.wild.cache import Cache
from hfprune.wild.plan import Plan, PlanItem
from hfprune.wild.videos import Videos, address


@dataclass
class Prepared:
    """An item that can be tested.

    Attributes:
        samples: float32 (samples,) at 16,000 a second.
        reference: as people wrote it.
        normalised: as it is compared; never empty.
        language: of the reference.
    """

    samples: np.ndarray
    reference: str
    normalised: str
    language: str | None

    @property
    def duration(self) -> float:
        """In seconds."""
        return len(self.samples) / RATE

    def facts(self) -> dict[str, Any]:
        """What the database keeps of it: words a minute, decibels below full scale."""
        words = len(self.normalised.split())
        level = loudness(self.samples)
        return {
            "reference": self.reference,
            "reference_language": self.language,
            "duration": self.duration,
            "words": words,
            "speaking_rate": words / self.duration * 60,
            "loudness": level if np.isfinite(level) else None,
        }


class Preparer:
    """Gets the items of a plan ready; several threads may ask at once.

    Args:
        plan: whose items, and no others, are fetched.
        language: of the references; by default each item's own, on YouTube the plan's.
        cache: makes the one for what is downloaded.
        delete: whether what was downloaded is deleted after use.
        videos: what downloads.

    Raises:
        HfpruneError: the plan's dataset can't be opened, or its folder is not there.
    """

    def __init__(
        self, plan: Plan, language: str | None, cache: Callable[[], Cache], delete: bool, videos: Videos | None
    ) -> None:
        self._plan, self._delete = plan, delete
        self._language = language or (plan.language if plan.source == "youtube" else None)
        self._videos = (videos or Videos()) if plan.source == "youtube" else None
        self._cache = cache() if plan.source == "youtube" else None
        self._rows = None
        if plan.source == "folder" and not Path(plan.args["folder"]).is_dir():
            raise DataError(f"the plan's folder '{plan.args['folder']}' is not there")
        if plan.source == "dataset":
            from hfprune.wild.rows import Rows

            self._rows = Rows(plan)

    def prepare(self, item: PlanItem) -> Prepared:
        """The sound and the reference of an item; the reference first, since nothing is fetched without one.

        Raises:
            DataError: either can't be had, or the reference is empty or of another language.
        """
        if self._videos is not None and self._cache is not None:
            video = self._videos.look(item.key)
            prepared = self._reference(*self._videos.reference(video, self._language))
            try:
                prepared.samples = read_audio(self._videos.sound(video, self._cache), name=item.key)
            finally:
                self._cache.let_go(item.key, self._delete)
        elif self._rows is not None:
            prepared = self._reference(item.text or "", item.default_audio_language or self._language)
            prepared.samples = read_audio(self._rows.audio(item), name=item.key)
        else:
            prepared = self._reference(*folder.reference_of(self._plan, item, self._language))
            prepared.samples = read_audio(Path(self._plan.args["folder"]) / item.key, name=item.key)
        return prepared

    def address(self, item: PlanItem) -> str | None:
        """Where people find an item."""
        if self._plan.source == "youtube":
            return address(item.key)
        return str(Path(self._plan.args["folder"]) / item.key) if self._plan.source == "folder" else None

    def stop(self) -> None:
        """Ends downloads that threads are at or wait for."""
        if self._videos is not None and self._cache is not None:
            self._videos.stop()
            self._cache.close()

    def clear(self) -> None:
        """Deletes what was downloaded, where that is wanted."""
        if self._cache is not None and self._delete:
            self._cache.delete()

    def _reference(self, text: str, language: str | None) -> Prepared:
        if self._language and language and code_of(language) != code_of(self._language):
            raise DataError(f"the reference is in '{language}', not in '{self._language}'")
        normalised = normaliser(language)(text)
        if not normalised:
            raise DataError("the reference is empty")
        return Prepared(np.zeros(0, np.float32), text, normalised, language)
