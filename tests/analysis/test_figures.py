"""The figures against values worked out by hand."""

import numpy as np
import pytest
import torch

from hfprune.analysis.figures import Moments, correlations, edges, gap_between, gaussian_gap, normality, overlaps
from hfprune.selection import LayerScores


def layer(scores):
    return LayerScores("layer", len(scores), lambda start, stop: scores[start:stop])


def test_rank_correlations_of_one_swap():
    # Of six pairs one is turned round: tau (5 - 1) / 6; rho 1 - 6 * 2 / (4 * 15).
    rho, tau = correlations(np.array([1.0, 2, 3, 4]), np.array([1.0, 30, 20, 400]))
    assert rho == pytest.approx(0.8) and tau == pytest.approx(4 / 6)


@pytest.mark.parametrize("rows", [([1.0], [2.0]), ([1.0, 1, 1], [1.0, 2, 3])])
def test_rows_that_can_not_be_ranked(rows):
    assert correlations(*map(np.array, rows)) == (None, None)


def test_overlap_and_jaccard():
    one = [torch.tensor([True, True, False]), torch.tensor([True, False])]
    other = [torch.tensor([True, False, True]), torch.tensor([True, False])]
    assert overlaps(one, other) == (2 / 3, 2 / 4)
    nothing = [torch.zeros(3, dtype=torch.bool)]
    assert overlaps(nothing, nothing) == (None, None)


def test_dispersion_in_parts_is_that_of_the_whole():
    scores = torch.tensor([1.0, 2, 3, 4, 10])
    parts, more = Moments(), Moments()
    parts.add(scores[:2])
    more.add(scores[2:])
    parts.merge(more)
    assert parts.cv == pytest.approx(float(scores.std() / scores.mean()))
    alike, single = Moments(), Moments()
    alike.add(torch.zeros(3))
    single.add(torch.ones(1))
    assert alike.cv == 0 and single.cv is None


def test_the_gap_at_the_threshold():
    scores = torch.tensor([4.0, 1, 2, 5])
    gone = torch.tensor([False, True, True, False])
    assert edges(layer(scores), gone) == (2, 4)
    assert gap_between(2, 4, scale=3) == pytest.approx(2 / 3)
    assert gap_between(*edges(layer(scores), torch.ones(4, dtype=torch.bool)), scale=3) is None


def test_the_gap_among_gaussian_scores_is_their_mean_spacing():
    torch.manual_seed(0)
    scores = 1 + 0.1 * torch.randn(2_000, 200, dtype=torch.float64)
    ordered = scores.sort(dim=1).values
    measured = float((ordered[:, 60] - ordered[:, 59]).mean())
    assert gaussian_gap(0.1, 200, 60) == pytest.approx(measured, rel=0.06)
    assert gaussian_gap(0.1, 200, 0) is None and gaussian_gap(None, 200, 60) is None


def test_gaussian_values_are_told_from_others():
    torch.manual_seed(1)
    gaussian, uniform = normality(torch.randn(40, 50)), normality(torch.rand(2_000))
    assert gaussian.p > 0.05 and gaussian.distance < 0.03 and gaussian.sample == 2_000
    assert uniform.p < 1e-6 and uniform.distance > 0.04 and uniform.kurtosis == pytest.approx(-1.2, abs=0.1)
    assert normality(torch.ones(100)) is None and normality(torch.randn(10)) is None
