"""Selection against a stable sort, to the last unit."""

import math

import pytest
import torch

from hfprune import selection
from hfprune.errors import ConfigError, ModelError
from hfprune.selection import LayerScores, pattern_candidates, select, select_each


def layer(name, scores, **fields):
    return LayerScores(name, len(scores), lambda start, stop: scores[start:stop], **fields)


def check(layers, gone, total, scores):
    """Exactly `total` are gone, and nothing that stays scores below something that newly went."""
    assert sum(int(mask.sum()) for mask in gone.values()) == total
    before = {
        one.name: one.gone if one.gone is not None else torch.zeros(one.units, dtype=torch.bool) for one in layers
    }
    assert all(bool((gone[name] | ~before[name]).all()) for name in gone)
    went = torch.cat([scores[name][gone[name] & ~before[name]].double() for name in gone])
    stays = torch.cat([scores[name][~gone[name]].double() for name in gone])
    if len(went) and len(stays):
        assert went.max() <= stays.min()
    # The scores that went are those that a stable sort of all open ones puts first.
    opened = torch.cat([scores[name][~before[name]].double() for name in gone]).sort(stable=True).values
    assert torch.equal(went.sort().values, opened[: len(went)])


SCORES = {
    "random": lambda n: torch.randn(n),
    "equal": lambda n: torch.full((n,), 0.25),
    "zeros": lambda n: torch.zeros(n),
    "tied": lambda n: torch.randint(0, 4, (n,)).float(),
    "negative": lambda n: -torch.rand(n) - 1,
    "signed zeros": lambda n: torch.where(torch.rand(n) < 0.5, -0.0, 0.0),
    "around zero": lambda n: torch.randint(-1, 2, (n,)).float() * torch.where(torch.rand(n) < 0.5, -1.0, 1.0),
    "subnormal": lambda n: torch.randint(-5, 6, (n,)).float() * 1.4e-45,
    "huge": lambda n: torch.randn(n) * 1e38,
    "infinite": lambda n: torch.where(torch.rand(n) < 0.2, torch.inf, torch.randn(n)),
    "minus infinite": lambda n: torch.where(torch.rand(n) < 0.2, -torch.inf, torch.randn(n)),
    "close": lambda n: 1 + torch.randint(0, 50, (n,)).float() * 1.2e-7,
    "float64": lambda n: torch.randn(n, dtype=torch.float64),
    "float64 close": lambda n: 1 + torch.randint(0, 50, (n,)).double() * 2.3e-16,
    "float64 negative": lambda n: -torch.rand(n, dtype=torch.float64) * 1e300,
    "float64 subnormal": lambda n: torch.randint(-9, 9, (n,)).double() * 5e-324,
    "half": lambda n: torch.randn(n).half(),
    "bfloat16": lambda n: torch.randn(n).bfloat16(),
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.5, 0.999, 1.0])
def test_exactly_the_lowest(kind, fraction):
    scores = {"a": SCORES[kind](613), "b": SCORES[kind](1), "c": SCORES[kind](387)}
    layers = [layer(name, values) for name, values in scores.items()]
    total = round(fraction * 1001)
    check(layers, select(layers, total), total, scores)


def test_every_count_of_a_small_layer():
    scores = {"a": torch.tensor([0.0, -0.0, 1.0, 1.0, -1.0, 1e-45, 1.0, float("inf")])}
    for total in range(9):
        layers = [layer("a", scores["a"])]
        check(layers, select(layers, total), total, scores)


@pytest.mark.parametrize("kind", ["random", "tied", "equal", "signed zeros", "float64 close"])
def test_steps_are_monotone(kind):
    scores = {"a": SCORES[kind](500), "b": SCORES[kind](301)}
    gone = dict.fromkeys(scores)
    for total in (0, 1, 90, 90, 400, 801):
        scores = {name: SCORES[kind](len(values)) for name, values in scores.items()}  # scored anew each step
        layers = [layer(name, values, gone=gone[name]) for name, values in scores.items()]
        gone = select(layers, total)
        check(layers, gone, total, scores)


def test_less_than_is_gone_is_refused():
    gone = torch.tensor([True, True, False])
    with pytest.raises(ConfigError, match="^target: 1 units are to be gone, but 2 are gone already$"):
        select([layer("a", torch.rand(3), gone=gone)], 1)


@pytest.mark.parametrize("kind", ["random", "tied", "equal"])
def test_limits_are_exact(kind):
    scores = {name: SCORES[kind](size) - shift for name, size, shift in (("a", 100, 9), ("b", 200, 5), ("c", 300, 0))}
    limits = {"a": 40, "b": 150, "c": 299}
    for total in (0, 1, 39, 41, 200, 400, 488, 489):
        layers = [layer(name, values, limit=limits[name]) for name, values in scores.items()]
        gone = select(layers, total)
        counts = {name: int(mask.sum()) for name, mask in gone.items()}
        assert sum(counts.values()) == total
        assert all(counts[name] <= limits[name] for name in counts)
        if kind != "equal":
            assert counts["a"] == min(total, 40)
        for name, mask in gone.items():
            if counts[name]:
                assert scores[name][mask].max() <= scores[name][~mask].min()
    with pytest.raises(ConfigError, match="^pruning.target: 490 units are to go, but min_kept, .* leave only 489$"):
        select(layers, 490)


def test_limits_with_units_gone_before():
    before = torch.zeros(10, dtype=torch.bool)
    before[7:] = True
    layers = [layer("a", torch.arange(10.0) - 100, gone=before, limit=5), layer("b", torch.arange(10.0))]
    gone = select(layers, 9)
    assert gone["a"].tolist() == [True, True, False, False, False, False, False, True, True, True]
    assert gone["b"].tolist() == [True] * 4 + [False] * 6


def test_a_layer_beyond_its_limit_keeps_what_is_gone():
    gone = select(
        [layer("a", torch.rand(4), gone=torch.tensor([True] * 3 + [False]), limit=2), layer("b", torch.rand(4))], 5
    )
    assert gone["a"].tolist() == [True, True, True, False]
    assert int(gone["b"].sum()) == 2


def test_only_candidates_go():
    candidates = torch.tensor([False, True, False, True, True])
    gone = select([layer("a", torch.tensor([0.0, 3.0, 1.0, 2.0, 9.0]), candidates=candidates)], 2)["a"]
    assert gone.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("value", [math.nan, -math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_a_number_is_refused(value, dtype):
    scores = torch.randn(50, dtype=dtype)
    scores[17] = torch.tensor(value, dtype=dtype).copysign(torch.tensor(value, dtype=dtype))
    with pytest.raises(ModelError, match="^the criterion gave a score that is not a number in 'b'$"):
        select([layer("a", torch.randn(50)), layer("b", scores)], 10)


def test_not_a_number_among_what_is_gone_does_not_matter():
    gone = select([layer("a", torch.tensor([math.nan, 2.0, 1.0]), gone=torch.tensor([True, False, False]))], 2)
    assert gone["a"].tolist() == [True, False, True]


def test_ties_are_spread_over_layers_and_within_them():
    layers = [layer(str(i), torch.ones(size)) for i, size in enumerate((1000, 100, 3000, 50))]
    gone = select(layers, 2075)
    for one in layers:
        assert abs(int(gone[one.name].sum()) - one.units / 2) <= 1
        halves = gone[one.name].view(2, -1).sum(1)
        assert abs(int(halves[0] - halves[1])) <= 1


@pytest.mark.parametrize("kind", ["random", "tied", "equal", "signed zeros", "float64"])
def test_the_chunk_size_has_no_influence(monkeypatch, kind):
    scores = {"a": SCORES[kind](700), "b": SCORES[kind](301)}
    before = torch.rand(700) < 0.1
    found = []
    for chunk in (1 << 20, 100, 7, 1):
        monkeypatch.setattr(selection, "CHUNK", chunk)
        layers = [layer("a", scores["a"], gone=before, limit=500), layer("b", scores["b"])]
        found.append(select(layers, 600))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in scores)


def test_scores_are_asked_for_in_chunks(monkeypatch):
    monkeypatch.setattr(selection, "CHUNK", 64)
    scores, asked = torch.randn(1000), []

    def give(start, stop):
        asked.append(stop - start)
        return scores[start:stop]

    gone = select([LayerScores("a", 1000, give)], 500)["a"]
    assert int(gone.sum()) == 500
    assert max(asked) <= 64


def test_single_and_double_precision_are_ranked_together():
    single, double = torch.tensor([0.1, 0.3]), torch.tensor([0.1, 0.2], dtype=torch.float64)
    gone = select([layer("a", single), layer("b", double)], 2)
    assert gone["a"].tolist() == [True, False]  # 0.1 in single precision is a little above 0.1
    assert gone["b"].tolist() == [True, False]
    assert select([layer("a", single), layer("b", double)], 1)["b"].tolist() == [True, False]


def test_each_layer_by_itself():
    scores = {"a": torch.arange(10.0), "b": torch.arange(10.0) + 100}
    gone = select_each([layer(name, values) for name, values in scores.items()], {"a": 3, "b": 7})
    assert {name: mask.nonzero().flatten().tolist() for name, mask in gone.items()} == {
        "a": [0, 1, 2],
        "b": [0, 1, 2, 3, 4, 5, 6],
    }


def test_a_layer_without_units():
    gone = select([layer("a", torch.rand(0)), layer("b", torch.rand(4))], 2)
    assert len(gone["a"]) == 0
    assert int(gone["b"].sum()) == 2


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (2, 3)])
@pytest.mark.parametrize("chunk", [1 << 20, 30])
def test_patterns_remove_the_lowest_of_every_group(monkeypatch, kept, group, chunk):
    monkeypatch.setattr(selection, "CHUNK", chunk)
    scores = torch.randint(0, 9, (5, 3, 4 * group + 1)).float()
    found = pattern_candidates(scores, kept, group)
    assert not found[..., -1].any()
    groups = zip(scores[..., :-1].reshape(-1, group), found[..., :-1].reshape(-1, group), strict=True)
    for values, gone in groups:
        order = sorted(range(group), key=lambda i: float(values[i]))  # noqa: B023
        assert gone.nonzero().flatten().tolist() == sorted(order[: group - kept])


def test_patterns_hold_what_is_gone():
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    gone = torch.tensor([[False, False, False, True]])
    assert pattern_candidates(scores, 2, 4, gone).tolist() == [[True, False, False, True]]


def test_rows_shorter_than_a_group_stay():
    assert not pattern_candidates(torch.rand(4, 3), 2, 4).any()
