"""One registry for everything that a recipe calls by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from hfprune.errors import ConfigError

T = TypeVar("T")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None when nothing is close."""
    matches = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """An ending for an error message: the nearest known name, or all of them."""
    known = sorted(known)
    match = nearest(name, known)
    return f"did you mean '{match}'?" if match else f"known: {', '.join(known)}"


class Registry(Generic[T]):
    """Names to things; a name is given once, and an unknown one is answered with the nearest.

    Example:
        >>> shapes = Registry("shape")
        >>> @shapes.register("square")
        ... def square(side): return side * side
        >>> shapes["square"](3)
        9
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that enters its object under `name`; a ConfigError when the name is taken."""

        def enter(entry: T) -> T:
            if name in self._entries:
                raise ConfigError(f"the {self.kind} '{name}' is registered already")
            self._entries[name] = entry
            return entry

        return enter

    def unregister(self, name: str) -> None:
        """Takes a name out again."""
        del self._entries[name]

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise ConfigError(f"unknown {self.kind} '{name}'; {did_you_mean(name, self._entries)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)
