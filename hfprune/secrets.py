"""Access tokens, which must never be written into a file, a log or a card."""

from __future__ import annotations

import re
from typing import Any

# The Hub's tokens: of users, of organisations, of applications that act for a user.
_TOKEN = re.compile(r"(?<![A-Za-z0-9])(?:hf_(?:oauth_|jwt_)?|api_org_)[A-Za-z0-9]{30,}")


def holds_token(text: str) -> bool:
    """Whether a text holds what looks like a token of the Hub."""
    return _TOKEN.search(text) is not None


def key_of_token(values: Any, key: str = "") -> str | None:
    """The key (`training.hub_token`) under which nested maps and lists hold what looks like a token; None without."""
    if isinstance(values, str):
        return key if holds_token(values) else None
    if isinstance(values, dict):
        if any(holds_token(str(name)) for name in values):
            return key
        inner = [(f"{key}.{name}" if key else str(name), value) for name, value in values.items()]
    else:
        inner = [(key, value) for value in values] if isinstance(values, list | tuple) else []
    return next((found for name, value in inner if (found := key_of_token(value, name)) is not None), None)
