"""What is said of a criterion that can't do its work."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from hfprune.errors import DataError, ModelError, and_more


@contextmanager
def blaming(name: str) -> Iterator[None]:
    """Puts the criterion's name before what is wrong with its data, where that names no key itself."""
    try:
        yield
    except (DataError, ModelError) as error:
        if str(error).startswith(("pruning.", "data:")):
            raise
        raise type(error)(f"pruning.criterion: '{name}': {error}") from error


def warn_of_equal(name: str, alike: list[str]) -> None:
    """Names the layers or groups whose scores are all equal: which of their units go says nothing.

    That is no error: of two heads each is as far from the other under `fpgm`, and behind a norm that starts at zero, as
    in fresh residual networks, nothing has a gradient yet.

    Args:
        name: the criterion's.
        alike: names of layers or groups, at least one.
    """
    where = f"'{alike[0]}'{and_more(alike)}, whose scores are all equal"
    warnings.warn(f"pruning.criterion: '{name}' tells nothing apart in {where}", stacklevel=6)
