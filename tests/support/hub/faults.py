"""What goes wrong on demand: an answer that is an error, or a connection that breaks."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Fault:
    """One thing that goes wrong.

    Attributes:
        method, path: of the requests that it meets; `path` is a pattern that is searched for.
        status: answered in place of what was asked for; None breaks the connection.
        after: bytes of the body that arrive before the connection breaks, or of the answer where a file is fetched;
            None takes the whole request, does what it asks for, and breaks before it is answered.
        skip: requests that pass before the first that it meets.
        times: how many requests it meets.
        headers: of the answer.
        then: called right before the connection breaks.
    """

    method: str
    path: str
    status: int | None = None
    after: int | None = 0
    skip: int = 0
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    then: Callable[[], None] | None = None


class Faults:
    """The faults that are still to come."""

    def __init__(self) -> None:
        self.waiting: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, method: str, path: str, **how: object) -> None:
        self.waiting.append(Fault(method, path, **how))

    def clear(self) -> None:
        self.waiting.clear()

    def meet(self, method: str, path: str) -> Fault | None:
        """The fault that a request meets, if any; it counts as met."""
        with self._lock:
            for fault in self.waiting:
                if fault.method == method and re.search(fault.path, path):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    if fault.times:
                        fault.times -= 1
                        return fault
        return None
