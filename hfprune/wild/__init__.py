"""In the wild: recognisers on real recordings with human-made subtitles; where do the pruned ones break first?"""

from __future__ import annotations

from typing import Any

__all__ = ["WildReport", "report", "summarise"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from hfprune.wild import reports

        return getattr(reports, name)
    raise AttributeError(f"module 'hfprune.wild' has no attribute '{name}'")
