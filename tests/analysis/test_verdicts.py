"""Sentences and claims from made-up numbers."""

import math

import pytest

from hfprune.analysis.comparison import Comparison
from hfprune.analysis.verdicts import Group, Measure, claims, sentence, spread

ACCURACY = Measure("accuracy", True, 0.9, True)
PERPLEXITY = Measure("perplexity", False, 20.0, False)


def group(schedule, values, ratio=0.8, criterion="l1", length="2 epochs", epochs=2.0):
    costs = {"epochs": epochs, "optimizer_steps": 10.0, "seconds": 1.0, "scoring_batches": 0.0}
    return Group(criterion, schedule, ratio, length, tuple(values), costs)


def around(mean, by=0.01):
    return [mean - by, mean, mean + by]


def verdicts(measure, groups, family="convolutional", removal=False):
    return [claim.verdict for claim in claims(measure, groups, family, removal)]


def test_mean_and_standard_deviation_over_the_seeds():
    one, other = group("hybrid", [0.7, 0.8, 0.9]), group("one_shot", [0.5])
    assert one.mean == pytest.approx(0.8) and one.sd == pytest.approx(0.1)
    assert other.mean == 0.5 and other.sd is None and group("hybrid", []).mean is None
    assert spread(one, one) == pytest.approx(math.sqrt(2) * 0.1) and spread(one, other) is None


def test_a_win_beyond_the_spread_of_the_seeds():
    found = sentence(ACCURACY, [group("one_shot", around(0.7)), group("hybrid", around(0.8)), group("constant", [0.5])])
    assert found == (
        "at 0.8 hybrid (accuracy 80.00 % ± 1.00) wins, 10.00 points ahead of one_shot (accuracy 70.00 % ± 1.00): "
        "more than the seeds' spread of 1.41"
    )


def test_a_lead_within_the_spread_decides_nothing():
    found = sentence(ACCURACY, [group("one_shot", around(0.70)), group("hybrid", around(0.71))])
    assert found.endswith("1.00 points ahead of one_shot (accuracy 70.00 % ± 1.00): within the seeds' spread of 1.41, "
                          "so undecided")  # fmt: skip
    found = sentence(ACCURACY, [group("one_shot", [0.7]), group("hybrid", [0.8])])
    assert found.endswith("a single seed tells no spread, so this decides nothing")


def test_less_is_more_for_perplexity_and_names_say_what_differs():
    groups = [group("one_shot", around(30, 1), criterion="taylor"), group("one_shot", around(24, 1))]
    found = sentence(PERPLEXITY, groups, criteria=True, lengths=True)
    assert found.startswith("at 0.8 with 2 epochs l1 one_shot (perplexity 24 ± 1) wins, 6 ahead of taylor one_shot")
    assert sentence(PERPLEXITY, [group("hybrid", [])]) == "at 0.8 no run gave a value"
    assert sentence(PERPLEXITY, [group("hybrid", [3.0])]) == "at 0.8 only hybrid (perplexity 3) was run"


def test_claims_confirmed():
    groups = [
        *[
            group("one_shot", around(0.88), 0.5),
            group("constant", around(0.8), 0.5),
            group("geometric", around(0.8), 0.5),
        ],
        *[
            group("one_shot", around(0.6), 0.9),
            group("constant", around(0.7), 0.9),
            group("geometric", around(0.8), 0.9),
        ],
        *[group("hybrid", around(0.95), 0.5), group("hybrid", around(0.9), 0.9)],
        *[group("one_shot", around(0.95), 0.8, "taylor"), group("one_shot", around(0.6), 0.8)],
    ]
    assert verdicts(ACCURACY, groups) == ["confirmed"] * 4 + ["undecided"]


def test_claims_not_confirmed_and_undecided():
    against = [
        group("one_shot", around(0.7), 0.5),
        group("geometric", around(0.8), 0.5),
        group("hybrid", around(0.6), 0.5),
    ]
    first, second, third, fourth, fifth = claims(ACCURACY, against, "convolutional")
    assert (first.verdict, third.verdict) == ("not confirmed", "not confirmed")
    assert first.numbers == (
        "0 of 1 comparisons for it, 1 against, 0 within the spread: "
        "0.5: one_shot 70.00 % against geometric 80.00 % (spread 1.41)"
    )
    assert (second.verdict, fourth.verdict, fifth.verdict) == ("undecided",) * 3
    assert second.numbers.startswith("nothing here tests it")
    alike = [group("one_shot", around(0.70), 0.9), group("geometric", around(0.705), 0.9)]
    assert claims(ACCURACY, alike, "convolutional")[1].verdict == "undecided"
    once = [group("one_shot", [0.5], 0.9), group("geometric", [0.9], 0.9)]
    assert claims(ACCURACY, once, "convolutional")[1].verdict == "undecided"


def test_claims_look_at_the_kind_of_model():
    groups = [group("one_shot", around(0.7), 0.5), group("geometric", around(0.8), 0.5)]
    assert verdicts(ACCURACY, groups, "transformer")[:2] == ["undecided", "confirmed"]
    assert verdicts(ACCURACY, groups, "convolutional", removal=True)[:2] == ["undecided", "confirmed"]
    small = [group("one_shot", around(30, 1), 0.1), group("geometric", around(15, 1), 0.1)]
    assert verdicts(PERPLEXITY, small, "language")[4] == "confirmed"


def test_criteria_are_to_differ_in_the_middle_and_be_alike_above():
    high = [group("one_shot", around(0.5), 0.95, "fisher"), group("one_shot", around(0.505), 0.95)]
    assert verdicts(ACCURACY, high)[3] == "confirmed"
    high = [group("one_shot", around(0.2), 0.95, "fisher"), group("one_shot", around(0.5), 0.95)]
    assert verdicts(ACCURACY, high)[3] == "not confirmed"


def run(schedule, value, seed=0, epochs=2.0, ratio=0.8, failed=""):
    cost = {"epochs": epochs, "optimizer_steps": 10, "seconds": 1.0, "scoring_batches": 0}
    where = {"schedule": schedule, "ratio": ratio, "criterion": "l1", "seed": seed, "budget": epochs, "patience": None}
    facts = {"main_metric": "accuracy", "greater_is_better": True, "dense": 0.9, "family": "other", "removal": False}
    return {**where, "value": value, "failed": failed, "achieved": ratio, "targets": [ratio], "cost": cost, **facts}


def test_the_front_keeps_what_nothing_beats_at_its_cost():
    runs = [
        run("one_shot", 0.5, epochs=1.0),
        run("hybrid", 0.4, epochs=1.0),
        run("one_shot", 0.45, epochs=2.0),
        run("hybrid", 0.7, epochs=3.0),
    ]
    front = Comparison(runs, 4).front(0.8)
    assert [(one.schedule, one.length) for one in front] == [("one_shot", "1 epochs"), ("hybrid", "3 epochs")]


def test_failed_runs_are_counted_apart_and_incomplete_grids_told(tmp_path):
    runs = [run("one_shot", 0.5), run("one_shot", None, seed=1, failed="the loss became nan"), run("hybrid", 0.6)]
    found = Comparison(runs, 6)
    (first, second) = found.groups
    assert (first.values, first.failed, second.values) == ((0.5,), 1, (0.6,))
    assert found.to_csv().splitlines()[2].endswith("the loss became nan")
    assert set(found.save(tmp_path)) == {path.name for path in tmp_path.iterdir()}
    assert Comparison([], 6).to_dict()["groups"] == []
