"""What Gaussian filters make of criteria: coefficients of variation, and rank correlations at every size."""

import math

import pytest
import torch

import hfprune
from hfprune.criteria import criteria
from tests.analysis.models import Filters

PAIRS = ("l1-l2", "l2-fpgm", "l2-fermat", "fpgm-fermat")
# Filters, values a filter, copies to average over; simulated Spearman correlations of PAIRS; variation of l1, l2, fpgm.
SIMULATED = [
    (64, 27, 16, (0.927, 0.971, 0.971, 0.999), (0.132, 0.127, 0.063)),
    (64, 576, 16, (0.918, 0.971, 0.972, 1.000), (0.0289, 0.0264, 0.0133)),
    (256, 1152, 6, (0.926, 0.995, 0.995, 1.000), (0.0224, 0.0210, 0.0105)),
    (512, 4608, 2, (0.932, 0.998, 0.998, 1.000), (0.0111, 0.0104, 0.0052)),
]
KNOWN = [name for name in ("l1", "l2", "fpgm", "fermat") if name in criteria]


def compared(filters, values, copies):
    model = Filters([(filters, values // 9)] * copies)
    found = hfprune.similarity(model, KNOWN, example_inputs=model.example(), granularity="channel")
    assert len(found.layers) == copies and set(found.layers.values()) == {filters}
    return found


@pytest.mark.parametrize("filters, values, copies, spearman, cv", SIMULATED)
def test_the_simulated_table(filters, values, copies, spearman, cv):
    found = compared(filters, values, copies)
    simulated = dict(zip(PAIRS, spearman, strict=True))
    for pair in found.within:
        if (name := "-".join(pair)) in simulated:
            assert found.mean_within(pair).spearman == pytest.approx(simulated[name], abs=0.02)
    for name, wanted in zip(("l1", "l2", "fpgm"), cv, strict=True):
        if name in KNOWN:
            mean = sum(entry.cv for entry in found.dispersion[name].values()) / copies
            assert mean == pytest.approx(wanted, abs=0.02)
            assert mean == pytest.approx(wanted, rel=0.15)


def test_the_spread_falls_with_the_root_of_the_filters_size():
    for values in (27, 576):
        found = compared(64, values, 24)
        for name, wanted in (("l1", 0.7555 / math.sqrt(values)), ("l2", 1 / math.sqrt(2 * values))):
            entries = found.dispersion[name].values()
            assert sum(entry.cv for entry in entries) / len(entries) == pytest.approx(wanted, rel=0.04)
            assert sum(entry.floor for entry in entries) / len(entries) == pytest.approx(wanted, rel=0.04)


def test_raw_norms_empty_different_layers_and_normalised_ones_none():
    model = Filters([(16, 3), (16, 64)])
    with torch.no_grad():  # so large that L1 grows with the filter's size, and L2 falls
        for conv in model.convs:
            conv.weight *= conv.weight[0].numel() ** -0.75
    raw = hfprune.similarity(model, ["l1", "l2"], example_inputs=model.example(), normalize="none")
    assert raw.emptied == {"l1": ("convs.0",), "l2": ("convs.1",)}
    assert "l1: global ranking would empty layer convs.0" in raw.flags
    pair = ("l1", "l2")
    assert raw.mean_within(pair).spearman > 0.85
    assert raw.together[pair].overlap == 0 and raw.together[pair].spearman < 0
    mended = hfprune.similarity(model, ["l1", "l2"], example_inputs=model.example())
    assert mended.emptied == {"l1": (), "l2": ()} and mended.together[pair].spearman > 0.85

    # The warning says what pruning does: it stops at the last unit of just these layers.
    for criterion, emptied in (("l1", 0), ("l2", 1)):
        config = hfprune.PruningConfig(
            criterion=criterion, granularity="channel", normalize="none", target=0.46, round_to=1
        )
        smaller = Filters([(16, 3), (16, 64)])
        smaller.load_state_dict(model.state_dict())
        report = hfprune.prune(smaller, config, example_inputs=model.example())
        assert report.groups[f"convs.{emptied}"] == (16, 1) and report.groups[f"convs.{1 - emptied}"] == (16, 16)
