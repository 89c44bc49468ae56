"""Schedules against the published increments and rates (arXiv 2508.13836)."""

import pytest

from hfprune import schedules
from hfprune.errors import ConfigError

KINDS = ("one_shot", "constant", "geometric", "cubic", "hybrid")

# Ratio, rate, steps: the rate nearest below 2, 5 and 10 % of what remains.
FOUND = [
    *[(0.70, 0.02, 0.01987, 60), (0.70, 0.05, 0.04893, 24), (0.70, 0.10, 0.09546, 12)],
    *[(0.80, 0.02, 0.01992, 80), (0.80, 0.05, 0.04905, 32), (0.80, 0.10, 0.0957, 16)],
    *[(0.88, 0.02, 0.01999, 105), (0.88, 0.05, 0.04923, 42), (0.88, 0.10, 0.09604, 21)],
    *[(0.92, 0.02, 0.01985, 126), (0.92, 0.05, 0.04926, 50), (0.92, 0.10, 0.09989, 24)],
    *[(0.96, 0.02, 0.01992, 160), (0.96, 0.05, 0.04981, 63), (0.96, 0.10, 0.09863, 31)],
    *[(0.99, 0.02, 0.0200, 228), (0.99, 0.05, 0.04988, 90), (0.99, 0.10, 0.09937, 44)],
]

# Ratio, first step, then rate and steps of the geometric rest.
HYBRID = {
    (0.70, 0.5): [(0.01842, 12), (0.04365, 5), (0.07168, 3)],
    (0.70, 0.6): [(0.01741, 6), (0.03451, 3), (0.1, 1)],
    (0.80, 0.5): [(0.01962, 18), (0.04968, 7), (0.08531, 4)],
    (0.80, 0.6): [(0.01842, 12), (0.04365, 5), (0.07168, 3)],
    (0.80, 0.7): [(0.01741, 6), (0.03451, 3), (0.05132, 2)],
    (0.88, 0.5): [(0.01972, 24), (0.04668, 10), (0.09118, 5)],
    (0.88, 0.6): [(0.01914, 17), (0.04585, 7), (0.07884, 4)],
    (0.88, 0.7): [(0.01965, 10), (0.0484, 4), (0.09446, 2)],
    (0.88, 0.8): [(0.01654, 5), (0.04083, 2), (0.08, 1)],
    (0.92, 0.5): [(0.01997, 27), (0.04831, 11), (0.08679, 6)],
    (0.92, 0.6): [(0.0191, 20), (0.04706, 8), (0.09191, 4)],
    (0.92, 0.7): [(0.01893, 13), (0.04848, 5), (0.07948, 3)],
    (0.92, 0.8): [(0.0181, 7), (0.04172, 3), (0.06192, 2)],
    (0.96, 0.5): [(0.01968, 31), (0.04629, 13), (0.0976, 6)],
    (0.96, 0.6): [(0.01922, 23), (0.04838, 9), (0.08539, 5)],
    (0.96, 0.7): [(0.01987, 15), (0.04895, 6), (0.0955, 3)],
    (0.96, 0.8): [(0.01919, 9), (0.04265, 4), (0.08348, 2)],
    (0.99, 0.5): [(0.01961, 34), (0.04696, 14), (0.09171, 7)],
    (0.99, 0.6): [(0.01958, 25), (0.04823, 10), (0.09413, 5)],
    (0.99, 0.7): [(0.01994, 17), (0.04775, 7), (0.08206, 4)],
    (0.99, 0.8): [(0.01897, 11), (0.04127, 5), (0.1, 2)],
}
RATES = [(*key, *rate) for key, rates in HYBRID.items() for rate in rates]


@pytest.mark.parametrize(
    ("kind", "ratio", "steps", "first", "expected"),
    [
        ("one_shot", 0.8, 1, None, [0.8]),
        ("constant", 0.8, 5, None, [0.16] * 5),
        ("geometric", 0.8, 5, None, [0.27522034, 0.19947411, 0.14457478, 0.10478486, 0.07594594]),
        ("geometric", 0.7, 5, None, [0.21399691, 0.16820223, 0.13220747, 0.10391548, 0.08167789]),
        ("hybrid", 0.92, 3, 0.8, [0.8, 0.04171603, 0.0399758, 0.03830817]),
        ("cubic", 0.8, 2, None, [0.7, 0.1]),
    ],
)
def test_published_increments(kind, ratio, steps, first, expected):
    assert schedules.increments(kind, ratio, steps, first=first) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(("ratio", "largest", "rate", "steps"), FOUND)
def test_published_geometric_rates(ratio, largest, rate, steps):
    # The table is rounded to five places: a rate of exactly .1 may stand for one a little above.
    assert schedules.steps_for(ratio, largest) == steps
    assert schedules.geometric_rate(ratio, steps) == pytest.approx(rate, abs=1e-5)


def test_there_are_63_hybrid_rates():
    assert len(RATES) == 63


@pytest.mark.parametrize(("ratio", "first", "rate", "steps"), RATES)
def test_published_hybrid_rates(ratio, first, rate, steps):
    assert schedules.geometric_rate(ratio - first, steps) == pytest.approx(rate, abs=2e-5)
    made = schedules.increments("hybrid", ratio, steps, first=first)
    assert len(made) == steps + 1
    assert made[0] == first
    assert made[1] == pytest.approx(rate, abs=2e-5)
    assert [later / former for former, later in zip(made[1:], made[2:], strict=False)] == pytest.approx(
        [1 - made[1]] * (steps - 1)
    )
    assert sum(made) == pytest.approx(ratio, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [0.05, 0.5, 0.7, 0.92, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 5, 60])
def test_sums_and_last_target_are_the_ratio(kind, ratio, steps):
    assert sum(schedules.increments(kind, ratio, steps)) == pytest.approx(ratio, abs=1e-12)
    reached = schedules.targets(kind, ratio, steps)
    assert len(reached) == {"one_shot": 1, "hybrid": steps + 1}.get(kind, steps)
    assert reached[-1] == ratio
    assert reached == sorted(reached)
    assert all(step >= 0 for step in schedules.increments(kind, ratio, steps))


def test_kept_after_geometric_steps():
    reached = schedules.targets("geometric", 0.8, 5)
    assert [1 - t for t in reached] == pytest.approx([0.2 ** (t / 5) for t in range(1, 6)])


def test_cubic_follows_its_formula():
    assert schedules.targets("cubic", 0.9, 10) == pytest.approx([0.9 * (1 - (1 - t / 10) ** 3) for t in range(1, 11)])


def test_hybrid_starts_with_three_quarters():
    assert schedules.targets("hybrid", 0.8, 3)[0] == pytest.approx(0.6)


def test_nothing_is_removed_at_ratio_zero():
    assert schedules.targets("geometric", 0.0, 3) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("largest", [0.01, 0.02, 0.05, 0.1, 0.3])
def test_steps_for_is_the_smallest_number(largest):
    steps = schedules.steps_for(0.9, largest, first=0.5)
    assert schedules.geometric_rate(0.4, steps) <= largest + 1e-12
    assert steps == 1 or schedules.geometric_rate(0.4, steps - 1) > largest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("geometrc", 0.5, 2), "unknown schedule 'geometrc'; did you mean 'geometric'?"),
        (("constant", 1.0, 2), "ratio: 1.0 must lie in [0, 1), e.g. 0.5"),
        (("constant", -0.1, 2), "ratio: -0.1 must lie in [0, 1), e.g. 0.5"),
        (("constant", float("nan"), 2), "ratio: nan must lie in [0, 1), e.g. 0.5"),
        (("constant", 0.5, 0), "steps: 0 must be at least 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError) as error:
        schedules.targets(*arguments)
    assert str(error.value) == message


@pytest.mark.parametrize("first", [0.0, 0.8, 0.9, -0.1])
def test_first_must_lie_below_the_ratio(first):
    with pytest.raises(ConfigError, match=rf"^first: {first} must lie between 0 and the ratio 0.8, e.g. 0.6$"):
        schedules.targets("hybrid", 0.8, 3, first=first)


def test_first_belongs_to_hybrid():
    with pytest.raises(ConfigError, match="^first: only the hybrid schedule has a first step of its own, not 'cubic'$"):
        schedules.targets("cubic", 0.8, 3, first=0.5)


@pytest.mark.parametrize("largest", [0.0, 1.0, -1.0])
def test_largest_step_must_be_a_fraction(largest):
    with pytest.raises(ConfigError, match=rf"^largest_step: {largest} must lie between 0 and 1, e.g. 0.1$"):
        schedules.steps_for(0.8, largest)


@pytest.mark.parametrize(
    ("ratio", "first", "message"),
    [(1.0, 0.0, "ratio: 1.0 must lie in"), (1.5, 0.0, "ratio: 1.5 must lie in"), (0.5, 0.6, "first: 0.6 must lie")],
)
def test_steps_for_refuses_what_no_number_of_steps_reaches(ratio, first, message):
    with pytest.raises(ConfigError, match=message):
        schedules.steps_for(ratio, 0.1, first=first)
