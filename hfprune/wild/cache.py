"""A cache of downloaded sound: bounded, and of nothing but what it was asked to hold."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from threading import Condition

from hfprune.errors import CheckpointError, DataError
from hfprune.profiling import human_bytes


class Cache:
    """Files that are held while they are needed; of the others the least lately used go when room is needed.

    It lives in a folder of its own, `downloads`, and touches nothing beside it. Threads may share it.

    Args:
        folder: where that folder is made.
        size: bytes that the files may take together.

    Raises:
        CheckpointError: the folder can't be made.
    """

    def __init__(self, folder: str | Path, size: int) -> None:
        self.folder = Path(folder) / "downloads"
        self.size = size
        self._held: dict[str, int] = {}
        self._changed = Condition()
        self._closed = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"the cache '{folder}' can't be made: {error.strerror}") from error

    def pattern(self) -> str:
        """The names of its files, as yt-dlp takes them."""
        return str(self.folder).replace("%", "%%") + "/%(id)s.%(ext)s"

    def hold(self, key: str, size: int) -> Path | None:
        """Holds what is known by a key, and gives its file where it is there already; else makes room for it, and waits
        where others hold too much.

        Raises:
            DataError: it is larger than the whole cache, or the cache was closed meanwhile.
        """
        if size > self.size:
            raise DataError(f"its sound ({human_bytes(size)}) is larger than the cache ({human_bytes(self.size)})")
        with self._changed:
            found = self._whole(key)
            size = found.stat().st_size if found else size
            self._changed.wait_for(lambda: self._closed or sum(self._held.values()) + size <= self.size)
            if self._closed:
                raise DataError("stopped")
            self._held[key] = size
            self._make_room()
            if found is not None:
                found.touch()
            return found

    def keep(self, key: str) -> Path:
        """The file that was downloaded for a key that is held.

        Raises:
            DataError: there is none, as where it is larger than the cache.
        """
        with self._changed:
            found = self._whole(key)
            if found is None:
                raise DataError(
                    f"nothing was downloaded: no sound, or more than the cache holds ({human_bytes(self.size)})"
                )
            self._held[key] = found.stat().st_size
            self._make_room()
            return found

    def let_go(self, key: str, delete: bool = False) -> None:
        """Holds it no longer, and deletes it where that is wanted."""
        with self._changed:
            if self._held.pop(key, None) is not None and delete:
                for path in self._files(key):
                    with suppress(OSError):
                        path.unlink()
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the waiting of other threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def delete(self) -> None:
        """Deletes all of its files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self, key: str | None = None) -> list[Path]:
        with suppress(OSError):
            return [path for path in self.folder.iterdir() if key is None or path.name.partition(".")[0] == key]
        return []

    def _whole(self, key: str) -> Path | None:
        """Its file; what is half downloaded (`.part`, `.ytdl`) is none."""
        return next((path for path in self._files(key) if not {".part", ".ytdl"} & set(path.suffixes)), None)

    def _make_room(self) -> None:
        free = [path for path in self._files() if path.name.partition(".")[0] not in self._held]
        taken = sum(path.stat().st_size for path in free) + sum(self._held.values())
        for path in sorted(free, key=lambda path: path.stat().st_mtime):
            if taken <= self.size:
                break
            taken -= path.stat().st_size
            path.unlink(missing_ok=True)
