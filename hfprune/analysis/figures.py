"""The figures of a comparison: rank correlations, overlaps, dispersion and normality, each of plain numbers."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats

from hfprune.selection import LayerScores


@dataclass(frozen=True)
class Agreement:
    """How alike two criteria rank the same units.

    Attributes:
        spearman, kendall: rank correlations, tau-b; None where a criterion scores all units the same.
        overlap: of the units that one would remove, the fraction that the other would remove too (|A∩B| / k).
        jaccard: |A∩B| / |A∪B|.
        units: how many there are.
    """

    spearman: float | None
    kendall: float | None
    overlap: float | None
    jaccard: float | None
    units: int


@dataclass(frozen=True)
class Dispersion:
    """Whether a criterion tells units apart.

    Attributes:
        cv: coefficient of variation: the scores' standard deviation over the mean of their absolute values.
        floor: that of independent Gaussian weights of the same shapes; None for criteria that look at data.
        gap: from the highest score that goes to the lowest that stays, over the mean of the absolute scores.
        gap_floor: what the gap of so many Gaussian scores of the floor's dispersion would be on average.
        units: how many there are.
        pruned: how many of them would go.
    """

    cv: float | None
    floor: float | None
    gap: float | None
    gap_floor: float | None
    units: int
    pruned: int


@dataclass(frozen=True)
class Normality:
    """Whether a tensor's values could be Gaussian.

    Attributes:
        statistic, p: of D'Agostino and Pearson's test of skewness and kurtosis (1973).
        distance: the largest distance between the distribution of the standardised values and the Gaussian one
            (Kolmogorov and Smirnov), which does not grow with the number of values as the statistic does.
        skewness, kurtosis: of the values; 0 and 0 for a Gaussian.
        values: how many the tensor has.
        sample: how many of them were looked at.
    """

    statistic: float
    p: float
    distance: float
    skewness: float
    kurtosis: float
    values: int
    sample: int


@dataclass
class Moments:
    """Sums from which the dispersion of scores follows, layer by layer or over all."""

    units: int = 0
    total: float = 0.0
    squares: float = 0.0
    size: float = 0.0

    def add(self, scores: torch.Tensor) -> None:
        """Takes in some scores."""
        scores = scores.double()
        self.units += scores.numel()
        self.total += float(scores.sum())
        self.squares += float(scores.square().sum())
        self.size += float(scores.abs().sum())

    def merge(self, other: Moments) -> None:
        """Takes in all that another has seen."""
        self.units += other.units
        self.total += other.total
        self.squares += other.squares
        self.size += other.size

    @property
    def scale(self) -> float:
        """The mean of the absolute scores."""
        return self.size / self.units if self.units else 0.0

    @property
    def cv(self) -> float | None:
        """Standard deviation (of a sample) over the mean absolute score; 0 where all are alike, None for one unit."""
        if self.units < 2:
            return None
        variance = (self.squares - self.total**2 / self.units) / (self.units - 1)
        return max(0.0, variance) ** 0.5 / self.scale if self.scale else 0.0


def correlations(one: np.ndarray, other: np.ndarray) -> tuple[float | None, float | None]:
    """Spearman's rho and Kendall's tau-b of two rows of scores; None where one of them is constant."""
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None, None
    return float(stats.spearmanr(one, other).statistic), float(stats.kendalltau(one, other).statistic)


def overlaps(one: list[torch.Tensor], other: list[torch.Tensor]) -> tuple[float | None, float | None]:
    """|A∩B| / k and the Jaccard index of two choices, each bool tensors by layer; None where nothing goes."""
    both = sum(int((a & b).sum()) for a, b in zip(one, other, strict=True))
    either = sum(int((a | b).sum()) for a, b in zip(one, other, strict=True))
    most = max(sum(int(a.sum()) for a in one), sum(int(b.sum()) for b in other))
    return (both / most, both / either) if most else (None, None)


def edges(layer: LayerScores, gone: torch.Tensor) -> tuple[float, float]:
    """The highest score that goes and the lowest that stays; infinities where there is none."""
    highest, lowest = -np.inf, np.inf
    for start, stop, _, scores in layer.chunks(torch.float64):
        mask = gone[start:stop].to(scores.device)
        if mask.any():
            highest = max(highest, float(scores[mask].max()))
        if not mask.all():
            lowest = min(lowest, float(scores[~mask].min()))
    return highest, lowest


def gap_between(highest: float, lowest: float, scale: float) -> float | None:
    """The gap at the threshold over the mean absolute score; None where all goes or all stays."""
    if not np.isfinite(highest) or not np.isfinite(lowest) or not scale:
        return None
    return max(0.0, lowest - highest) / scale


def gaussian_gap(cv: float | None, units: int, pruned: int) -> float | None:
    """The average gap at the threshold among Gaussian scores: their spacing at a quantile, cv / (n φ(z))."""
    if cv is None or not 0 < pruned < units:
        return None
    return float(cv / (units * stats.norm.pdf(stats.norm.ppf(pruned / units))))


def normality(values: torch.Tensor) -> Normality | None:
    """The test of a sample's values; None where there are too few (20 are needed) or all are the same.

    Args:
        values: of any shape.
    """
    sample = values.double().flatten().cpu().numpy()
    if len(sample) < 20 or np.ptp(sample) == 0 or not np.isfinite(sample).all():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        tested = stats.normaltest(sample)
    standard = (sample - sample.mean()) / sample.std(ddof=1)
    distance = stats.kstest(standard, "norm").statistic
    shape = float(stats.skew(sample)), float(stats.kurtosis(sample))
    return Normality(float(tested.statistic), float(tested.pvalue), float(distance), *shape, len(sample), len(sample))
