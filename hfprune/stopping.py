"""Stopping: what SIGTERM means. A command ends at once, or, where a model is being trained, after a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hfprune.errors import Terminated


class _Signal:
    """How many blocks wait for a good moment, and whether the signal has come."""

    waiting = 0
    came = False


def on_sigterm(*_: Any) -> None:
    """The handler: leaves the first signal to a block that waits for a good moment; the second ends it all the same.

    Raises:
        Terminated: where no block waits.
    """
    if _Signal.waiting and not _Signal.came:
        _Signal.came = True
        return
    raise Terminated


@contextmanager
def handled() -> Iterator[None]:
    """SIGTERM as `on_sigterm` handles it, for the time of the block; only the main thread can ask for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def deferred() -> Iterator[None]:
    """A block in which SIGTERM waits until the block looks at `requested`, or has ended.

    Raises:
        Terminated: at the end, where the signal came and the block did not see to it.
    """
    _Signal.waiting += 1
    try:
        yield
    finally:
        _Signal.waiting -= 1
        came, _Signal.came = _Signal.came, _Signal.came and bool(_Signal.waiting)
    if came and not _Signal.waiting:
        raise Terminated


def requested() -> bool:
    """Whether the signal has come in this block."""
    return _Signal.came
