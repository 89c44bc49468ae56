"""The grid: which runs there are, how a budget is divided, and what is refused."""

import pytest

from hfprune.config import PruningConfig
from hfprune.errors import ConfigError
from hfprune.grid import Grid, overrides_of
from hfprune.recipe import Recipe
from tests.test_pipeline import recipe_values


def cells(grid, seed=0, **pruning):
    return Grid(**grid).cells(PruningConfig(**{"target": 0.5, **pruning}), seed)


def cell(schedule, budget=2.0, ratio=0.8, **grid):
    (one,) = cells({"schedules": [schedule], "ratios": [ratio], "seeds": 1, "budget": budget, **grid})
    return one


def test_every_combination_once_seed_by_seed():
    grid = {"schedules": ["one_shot", "hybrid", "one_shot"], "ratios": [0.9, 0.5], "seeds": 2, "budget": [1, 3]}
    found = cells({**grid, "criteria": ["l1", {"name": "taylor", "batches": 2}]}, seed=7)
    assert len(found) == len({one.key for one in found}) == 2 * 2 * 2 * 2 * 2
    assert [one.seed for one in found] == [7] * 16 + [8] * 16
    assert {one.ratio for one in found[:8]} == {0.5, 0.9}
    assert {one.criterion_words for one in found} == {"l1", "taylor batches=2"}
    assert found[0].words == "l1 one_shot 0.5, 1 epochs, seed 7"


def test_a_run_has_the_recipe_s_pruning_with_its_own_schedule_target_and_criterion():
    found = cells({"budget": 2, "seeds": 1, "ratios": [0.6], "steps": 3}, criterion="l2", min_kept=1, scope="layer")
    assert [len(one.pruning.targets()) for one in found] == [1, 3, 3, 3]
    assert all(one.pruning.targets()[-1] == 0.6 for one in found)
    assert {(one.pruning.criterion, one.pruning.min_kept, one.pruning.scope) for one in found} == {("l2", 1, "layer")}
    structural = cells({"budget": 2, "ratios": [0.4]}, granularity="channel", target={"macs": 0.5})
    assert structural[0].pruning.target.macs == 0.6


def test_steps_by_their_size():
    found = {one.schedule: one for one in cells({"budget": 9, "seeds": 1, "ratios": [0.92], "largest_step": 0.1})}
    assert {name: len(one.pruning.targets()) for name, one in found.items()} == {
        "one_shot": 1,
        "constant": 24,
        "geometric": 24,
        "hybrid": 1 + 3,
    }


@pytest.mark.parametrize("updates", [1, 7, 79])
@pytest.mark.parametrize("budget", [4.0, 2.5, 0.0])
def test_every_schedule_has_the_same_optimizer_steps_in_all(updates, budget):
    for schedule in ("one_shot", "constant", "geometric", "hybrid"):
        one = cell(schedule, budget, steps=2)
        lengths = one.lengths(len(one.pruning.targets()), updates)
        assert sum(lengths) == round(budget * updates)


def test_the_hybrid_s_first_step_gets_half():
    assert cell("hybrid").lengths(4, 120) == [120, 40, 40, 40]
    assert cell("geometric").lengths(4, 120) == [60, 60, 60, 60]
    assert cell("one_shot").lengths(1, 120) == [240]


def test_keys_differ_where_runs_differ():
    one = cell("hybrid")
    assert one.key == cell("hybrid").key
    others = [cell("hybrid", 3.0), cell("geometric"), cell("hybrid", ratio=0.81), cell("hybrid", steps=5)]
    others += cells({"schedules": ["hybrid"], "ratios": [0.8], "seeds": 1, "budget": 2}, min_kept=1)
    assert len({one.key, *(other.key for other in others)}) == 6
    assert one.key.startswith("l1-hybrid-0.8-2ep-seed0-")


def test_patience_may_be_the_recipe_s_own():
    (one,) = cells({"schedules": ["hybrid"], "ratios": [0.5], "seeds": 1}, recovery={"patience": [4, 1]})
    assert one.patience == [4, 1] and one.budget is None
    (one,) = cells({"schedules": ["hybrid"], "ratios": [0.5], "seeds": 1, "patience": 3})
    assert one.patience == 3 and one.length_words == "patience 3"


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"ratios": [80]}, "compare.ratios: 80 must be the fraction that goes, between 0 and 1; 80 % is 0.8"),
        ({"ratios": [1.0]}, "compare.ratios: 1 must be the fraction"),
        ({"ratios": []}, "compare.ratios: an empty list"),
        ({"schedules": ["hybird"]}, "compare.schedules: unknown schedule 'hybird'; did you mean 'hybrid'?"),
        ({"schedules": ["auto"]}, "compare.schedules: auto picks one of the others"),
        ({"budget": 2, "patience": 1}, "compare.patience: give either budget or patience"),
        ({"steps": 3, "largest_step": 0.1}, "compare.largest_step: give either"),
        ({"budget": -1}, "compare.budget: input should be greater than or equal to 0, not -1"),
        ({"seed": 3}, "compare.seed: unknown key; did you mean 'seeds'?"),
    ],
)
def test_bad_grids_are_named_in_the_recipe(tmp_path, grid, message):
    with pytest.raises(ConfigError) as error:
        Recipe.parse(recipe_values(tmp_path, compare=grid))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_a_strategy_needs_is_said():
    with pytest.raises(ConfigError, match=r"compare.budget: missing; .*--budget 10.*--patience 2"):
        cells({})
    with pytest.raises(ConfigError, match="pruning.strategy: ice has one step a block"):
        cells({"budget": 1}, strategy="ice", granularity="channel")
    with pytest.raises(ConfigError, match="pruning.export_sizes: says the targets itself"):
        cells({"budget": 1}, target=None, granularity="rank", export_sizes=[0.8, 0.5])
    with pytest.raises(ConfigError, match="target.ratio: 2:4 removes 0.5, not 0.8"):
        cells({"budget": 1, "ratios": [0.8]}, granularity="2:4")
    with pytest.raises(ConfigError, match="compare.budget: 0.02 epochs are 2 optimizer steps, too few for the 4"):
        cell("geometric", 0.02).lengths(4, 100)


def test_options_become_overrides_and_replace_what_they_exclude():
    assert overrides_of() == []
    assert overrides_of(ratios=".5,.8", seeds=2) == ["compare.ratios=[.5,.8]", "compare.seeds=2"]
    assert overrides_of(budget="2,4") == ["compare.budget=[2,4]", "compare.patience=null"]
    assert overrides_of(patience=3) == ["compare.patience=3", "compare.budget=null"]
    assert overrides_of(steps=3) == ["compare.steps=3", "compare.largest_step=null"]
