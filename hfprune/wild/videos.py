"""Videos on the web, by yt-dlp as a library: which subtitles people made for them, and their sound."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfprune.errors import DataError
from hfprune.speech.captions import captions_of, choose_language, text_of
from hfprune.speech.needs import needed
from hfprune.wild.cache import Cache

# What yt-dlp says, in the words of sites and its own, and what it means; the first that is found counts.
_MEANINGS = (
    (r"http error (429|5\d\d)|temporarily unavailable", "no connection", False),
    (r"not a bot", "taken for a robot", False),
    (r"private video|video is private", "a private video", True),
    (r"live event|premieres in|is not currently live|live stream", "a live stream", True),
    (r"in your country|in your (geo|region)|geo.?(restrict|block)|blocked it (in|on)", "not available here", True),
    (r"removed|terminated|no longer available|deleted|unavailable|does not exist", "the video was removed", True),
    (r"confirm your age|age.?restrict|sign in|log ?in|members.only|payment", "only for those logged in", True),
    (r"no space left|disk quota", "the disk is full", False),
    (r"timed? ?out", "no answer in time", False),
    (r"getaddrinfo|name resolution|unreachable|refused|connection", "no connection", False),
)


class Unavailable(DataError):
    """A video that can't be had.

    Args:
        line: why.
        lasting: whether asking again is of no use.
    """

    def __init__(self, line: str, lasting: bool = True) -> None:
        super().__init__(line)
        self.lasting = lasting


@dataclass
class Video:
    """What a site says of a video.

    Attributes:
        key: its id.
        manual: languages of the subtitles that people made.
        generated: languages of automatic captions.
        language: what is spoken, where that is said.
        size: bytes of its sound, as far as they are known.
        info: all of it, in yt-dlp's form.
    """

    key: str
    manual: list[str]
    generated: list[str]
    language: str | None
    size: int
    info: dict[str, Any] = field(repr=False)


class Videos:
    """Asks for one video at a time, and only for those that it is named.

    Args:
        timeout: seconds until a silent connection is given up.
    """

    def __init__(self, timeout: float = 30.0) -> None:
        self.timeout = timeout
        self.stopped = False

    def look(self, key: str) -> Video:
        """What there is to know of a video, without its sound.

        Raises:
            Unavailable: it is private, removed, a live stream, not shown here, or did not answer.
        """
        info = self._extract(key, download=False)
        if info.get("is_live") or info.get("live_status") in ("is_live", "is_upcoming", "post_live"):
            raise Unavailable("a live stream")
        size = info.get("filesize") or info.get("filesize_approx") or 20_000 * (info.get("duration") or 0)
        manual = sorted(code for code, kinds in (info.get("subtitles") or {}).items() if code != "live_chat" and kinds)
        return Video(key, manual, sorted(info.get("automatic_captions") or {}), info.get("language"), int(size), info)

    def reference(self, video: Video, language: str | None) -> tuple[str, str]:
        """The subtitles that people made for a video in a language, by default in that of its speech; and their own.

        Raises:
            DataError: there are none, or they can't be read.
        """
        wanted = language or video.language or (video.manual[0].split("-")[0] if len(video.manual) == 1 else None)
        code = choose_language(video.manual, wanted) if wanted else None
        if code is None:
            raise DataError(no_subtitles(video, wanted))
        kinds = {kind.get("ext"): kind for kind in video.info["subtitles"][code]}
        kind = next((kind for kind in ("vtt", "srt") if kind in kinds), None)
        if kind is None:
            raise DataError(f"the subtitles in '{code}' are neither vtt nor srt: {', '.join(map(str, kinds))}")
        text = kinds[kind].get("data") or self._fetch(kinds[kind]["url"])
        return text_of(captions_of(text, kind, f"subtitles in '{code}'")), code

    def sound(self, video: Video, cache: Cache) -> Path:
        """A file with the sound of a video, held in the cache until it is let go.

        Raises:
            DataError: it can't be downloaded, is larger than the cache, or the disk is full.
        """
        kept = cache.hold(video.key, video.size)
        if kept is not None:
            return kept
        try:
            self._extract(video.key, download=True, cache=cache)
            return cache.keep(video.key)
        except BaseException:
            cache.let_go(video.key, delete=True)
            raise

    def stop(self) -> None:
        """Ends downloads that other threads are at."""
        self.stopped = True

    def _options(self, cache: Cache | None) -> dict[str, Any]:
        def goes_on(_: dict[str, Any]) -> None:
            if self.stopped:
                raise needed("yt_dlp.utils").DownloadCancelled("stopped")

        options = {
            "format": "bestaudio/best",
            "quiet": True,
            "no_warnings": True,
            "noprogress": True,
            "logger": _Silent(),
            "noplaylist": True,
            "cachedir": False,
            "fixup": "never",
            "socket_timeout": self.timeout,
            "retries": 2,
            "progress_hooks": [goes_on],
        }
        if cache is not None:
            options |= {"outtmpl": cache.pattern(), "max_filesize": cache.size}
        return options

    def _extract(self, key: str, download: bool, cache: Cache | None = None) -> dict[str, Any]:
        if not re.fullmatch(r"[\w-]{11}", key):
            raise DataError(f"'{key}' is not the id of a video")
        yt_dlp = needed("yt_dlp")
        try:
            with yt_dlp.YoutubeDL(self._options(cache)) as client:
                info = client.extract_info(address(key), download=download)
        except (yt_dlp.utils.YoutubeDLError, OSError) as error:
            raise _meaning(error) from error
        if not info:
            raise Unavailable("the video was removed")
        return info

    def _fetch(self, url: str) -> str:
        yt_dlp = needed("yt_dlp")
        try:
            with yt_dlp.YoutubeDL(self._options(None)) as client:
                return client.urlopen(url).read().decode("utf-8-sig")
        except (yt_dlp.utils.YoutubeDLError, yt_dlp.networking.exceptions.RequestError, OSError) as error:
            raise _meaning(error) from error
        except UnicodeDecodeError as error:
            raise DataError(f"the subtitles can't be read: {error}") from error


class _Silent:
    """Takes what yt-dlp prints: what matters comes as an exception."""

    def debug(self, _: str) -> None:
        pass

    info = warning = error = debug


def address(key: str) -> str:
    """Where a video is watched."""
    return f"https://www.youtube.com/watch?v={key}"


def no_subtitles(video: Video, language: str | None) -> str:
    """Why a video has no reference."""
    if language is None:
        return f"in which language? its subtitles are in: {', '.join(video.manual) or 'none'}"
    there = f"; there are: {', '.join(video.manual)}" if video.manual else ""
    automatic = any(code.split("-")[0] == language for code in video.generated)
    only = "; only automatic captions" if automatic and not there else ""
    return f"no human-made subtitles in '{language}'{there}{only}"


def _meaning(error: Exception) -> Unavailable:
    """Why a video can't be had, in words that are the same for all that have the same cause."""
    cause = (getattr(error, "exc_info", None) or (None, None))[1]
    full = errno.ENOSPC in (getattr(error, "errno", None), getattr(cause, "errno", None))
    said = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
    said = re.sub(r"^(ERROR: )?(\[[\w:]+\] )?([\w-]{11}: )?", "", said).partition("; please report this issue")[0]
    if full:
        return Unavailable(f"the disk is full: {said}", False)
    for pattern, words, lasting in _MEANINGS:
        if re.search(pattern, said, re.IGNORECASE):
            return Unavailable(f"{words}: {said[:200]}", lasting)
    return Unavailable(said[:200] or type(error).__name__)
