"""What `pip install 'hfprune[speech]'` brings: asked for where it is used, with a line that says so where it lacks."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from hfprune.errors import ConfigError


def needed(module: str) -> ModuleType:
    """A module of an optional library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise ConfigError(f"speech needs '{library}': pip install 'hfprune[speech]'") from error
