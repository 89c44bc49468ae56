"""Which numbers of a module its code reads: those that only a constructor ever sees do not change what it computes."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from functools import cache
from types import CodeType, ModuleType
from typing import Any

# Code that reads other modules' attributes: attention functions, masks, caches, generation.
_SHARED = (
    "transformers.integrations.",
    "transformers.modeling_",
    "transformers.masking_utils",
    "transformers.cache_utils",
    "transformers.generation.",
    "transformers.pytorch_utils",
    "timm.layers.",
)
_BUILDERS = ("__init__", "extra_repr", "__repr__", "reset_parameters", "_init_weights")


def is_read(kind: type, name: str) -> bool:
    """Whether any code but a constructor's mentions an attribute, in the files of a module's class or where all may.

    Args:
        kind: the class of the module that has the attribute.
        name: the attribute.
    """
    files = {base.__module__ for base in kind.__mro__ if base.__module__ not in ("torch.nn.modules.module", "builtins")}
    return any(name in _names(file) for file in files) or name in _shared_names(len(sys.modules))


@cache
def _shared_names(loaded: int) -> frozenset[str]:
    """The names in all shared files; looked up anew when other modules have been `loaded`."""
    return frozenset().union(*(_names(file) for file in list(sys.modules) if file.startswith(_SHARED)))


@cache
def _names(file: str) -> frozenset[str]:
    """All names and short strings that the functions and methods of a file mention."""
    module = sys.modules.get(file)
    return frozenset(name for code in _codes(module) for name in _mentioned(code)) if module else frozenset()


def _codes(module: ModuleType) -> Iterator[CodeType]:
    for value in list(vars(module).values()):
        if getattr(value, "__module__", None) != module.__name__:
            continue
        members = vars(value).items() if inspect.isclass(value) else [("", value)]
        for name, member in members:
            if name in _BUILDERS:
                continue
            if isinstance(member, property):
                functions: list[Any] = [member.fget, member.fset]
            else:
                functions = [getattr(member, "__func__", member)]
            for function in functions:
                code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
                if isinstance(code, CodeType):
                    yield code


def _mentioned(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _mentioned(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant
        elif isinstance(constant, tuple):
            yield from (item for item in constant if isinstance(item, str) and item.isidentifier())
