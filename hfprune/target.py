"""Target: how much goes, in the measures that people think in."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field, model_validator

from hfprune.strict import Ratio, StrictModel

_SCALES = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}

Left = float | int | str


class Target(StrictModel):
    """How much goes, by one of four measures.

    Attributes:
        ratio: the fraction of the prunable units that goes; exactly `round(ratio * units)` of them.
        params: what is left of the parameters: a fraction of the dense model's, or an absolute number (`5M`).
        macs: what is left of the multiply-accumulates of one example: a fraction, or an absolute number (`2G`).
        latency: what is left of the time of a forward pass on this machine: a fraction, or milliseconds (`5ms`).
        batch: the batch size that latency is measured at.
    """

    ratio: Ratio | None = None
    params: Left | None = None
    macs: Left | None = None
    latency: Left | None = None
    batch: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _one_measure(self) -> Target:
        given = [name for name in ("ratio", "params", "macs", "latency") if getattr(self, name) is not None]
        if len(given) != 1:
            said = " and ".join(given) or "none"
            raise ValueError(f"give exactly one of ratio, params, macs and latency, not {said}")
        if self.kind != "ratio":
            left = _number(self.kind, getattr(self, self.kind))
            if left <= 0:
                raise ValueError(f"{self.kind}: {getattr(self, self.kind)!r} leaves nothing of the model")
        return self

    @property
    def kind(self) -> str:
        """The measure: `ratio`, `params`, `macs` or `latency`."""
        return next(name for name in ("ratio", "params", "macs", "latency") if getattr(self, name) is not None)

    @property
    def fraction(self) -> float | None:
        """The fraction that goes; None for an absolute number, which only the model can tell."""
        if self.kind == "ratio":
            return self.ratio
        left = getattr(self, self.kind)
        number = _number(self.kind, left)
        return 1 - number if not isinstance(left, str) and number <= 1 else None

    def absolute(self) -> float:
        """The absolute number that is to be left: parameters, multiply-accumulates or milliseconds."""
        return _number(self.kind, getattr(self, self.kind))


def _number(kind: str, value: Any) -> float:
    """A fraction or an absolute number, as `2G`, `500M` or `5ms` say it.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, bool):
        raise ValueError(f"{kind}: {value} is no number")
    if isinstance(value, int | float):
        return float(value)
    pattern = r"\s*(\d+\.?\d*|\.\d+)\s*(ms|s)\s*" if kind == "latency" else r"\s*(\d+\.?\d*|\.\d+)\s*([KMGT]?)\s*"
    match = re.fullmatch(pattern, value, re.IGNORECASE)
    if match is None:
        example = "5ms" if kind == "latency" else "2G"
        raise ValueError(
            f"{kind}: '{value}' is no amount; give a fraction of the dense model, e.g. 0.5, or e.g. {example}"
        )
    if kind == "latency":
        return float(match[1]) * (1000 if match[2].lower() == "s" else 1)
    return float(match[1]) * _SCALES[match[2].upper()]
