"""Drop: how far a metric may fall, in points or as a fraction of the dense model's value."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from hfprune.strict import StrictModel

Positive = Annotated[float, Field(gt=0)]


class Drop(StrictModel):
    """How far the monitored metric may fall behind the dense model's; a bare number is in points.

    Attributes:
        points: percentage points of a fraction such as accuracy: 1.5 stands for a fall from 93.0 % to 91.5 %.
        relative: a fraction of the dense value, for any metric: 0.05 stands for 5 % of it.
    """

    points: Positive | None = None
    relative: Positive | None = None

    @model_validator(mode="after")
    def _unit(self) -> Drop:
        if (self.points is None) == (self.relative is None):
            raise ValueError("give either points or relative, e.g. {points: 1.5}")
        if self.points is not None and not 0.1 <= self.points <= 100:
            hint = f"write {100 * self.points:g} for {self.points:.3g} of 1" if self.points < 0.1 else "at most 100"
            raise ValueError(f"points: {self.points:g} is no number of percentage points ({hint})")
        if self.relative is not None and self.relative >= 1:
            raise ValueError(f"relative: {self.relative:g} is no fraction; write {self.relative / 100:g} for "
                             f"{self.relative:g} %")  # fmt: skip
        return self

    def of(self, dense: float, in_points: bool) -> float:
        """The drop in the metric's own unit.

        Args:
            dense: the dense model's value.
            in_points: whether the metric is a fraction of which points can be said: of 1, or of 100 if it is above 1.
        """
        if self.relative is not None or not in_points:
            return abs(dense) * (self.relative or 0.0)
        return self.points if abs(dense) > 1 else self.points / 100

    def __str__(self) -> str:
        return f"{self.points:g} points" if self.points is not None else f"{self.relative:.3g} of the dense value"


def points(value: Any) -> Any:
    """A bare number as percentage points; `true` as the usual ones."""
    if value is True:
        return {"points": 1.5}
    return {"points": float(value)} if isinstance(value, int | float) and not isinstance(value, bool) else value
