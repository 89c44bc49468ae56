"""The choice of ranks: within the cost, near the best there is, dense where that is better."""

import itertools

import numpy as np
import pytest

from hfprune.lowrank.ranks import Candidate, choose, smallest, total


def candidates(seed=0, **options):
    rng = np.random.default_rng(seed)
    found = []
    for name, (rows, columns) in {"a": (8, 8), "b": (6, 20), "c": (8, 8)}.items():
        scores = np.sort(rng.gamma(0.3, size=min(rows, columns)))[::-1] * (rows + columns)
        most = (rows * columns - 1) // (rows + columns)
        values = {"least": 1, "most": most, "full": len(scores), "peers": f"{rows} {columns}"} | options
        found.append(Candidate(name, scores, rows + columns, rows * columns, **values))
    return found


def lost(found, ranks):
    return sum(0.0 if ranks[c.path] is None else c.lost[ranks[c.path]] for c in found)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.7, 0.9])
def test_near_the_best_of_all(seed, fraction):
    found = candidates(seed)
    wanted = fraction * sum(c.whole for c in found)
    ranks = choose(found, wanted, "global")
    assert total(found, ranks) <= wanted
    every = [[None, *range(c.least, c.most + 1)] for c in found]
    possible = [dict(zip("abc", chosen, strict=True)) for chosen in itertools.product(*every)]
    best = min(lost(found, p) for p in possible if total(found, p) <= wanted)
    # What is chosen is best for its own price: no worse than the best that costs one layer's step less.
    nearly = [lost(found, p) for p in possible if total(found, p) <= wanted - max(c.whole - c.unit for c in found)]
    assert best <= lost(found, ranks) <= min(nearly, default=lost(found, smallest(found)))


def test_all_stay_dense_where_nothing_need_go():
    found = candidates()
    assert set(choose(found, sum(c.whole for c in found), "global").values()) == {None}


def test_less_than_the_smallest_gives_the_smallest():
    found = candidates()
    assert choose(found, 1.0, "global") == smallest(found) == {"a": 1, "b": 1, "c": 1}


def test_what_was_factored_never_grows_nor_becomes_dense():
    found = candidates(dense=False, most=3)
    assert choose(found, 1e9, "global") == {"a": 3, "b": 3, "c": 3}


@pytest.mark.parametrize("scope", ["layer", "isomorphic"])
def test_layers_or_peers_are_cut_alike(scope):
    found = candidates()
    wanted = 0.6 * sum(c.whole for c in found)
    ranks = choose(found, wanted, scope)
    assert 0.85 * wanted <= total(found, ranks) <= wanted
    sets = [["a"], ["b"], ["c"]] if scope == "layer" else [["a", "c"], ["b"]]
    for names in sets:
        members = [c for c in found if c.path in names]
        share = sum(c.cost(ranks[c.path]) for c in members) / sum(c.whole for c in members)
        assert share == pytest.approx(0.6, abs=max(c.unit / c.whole for c in members))


def test_steps_and_floors():
    found = candidates(step=2, least=2, most=2)
    assert set(choose(found, 0.5 * sum(c.whole for c in found), "global").values()) <= {None, 2}


def test_a_given_rank_stays():
    a, b, c = candidates()
    given = Candidate("a", a.scores, a.unit, a.whole, 1, 2, dense=False, fixed=True)
    ranks = choose([given, b, c], 0.5 * sum(x.whole for x in (a, b, c)), "global")
    assert ranks["a"] == 2 and total([given, b, c], ranks) <= 0.5 * sum(x.whole for x in (a, b, c))
