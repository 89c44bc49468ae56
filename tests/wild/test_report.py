"""The report on a run in the wild: figures, slices, ranking, files, and what can't be reported on."""

import csv
import json
import sqlite3

import pytest

from hfprune.errors import CheckpointError, DataError
from hfprune.wild import report, report_slices, summarise
from hfprune.wild.page import render_page
from hfprune.wild.report_slices import BINS
from hfprune.wild.report_tables import notes
from hfprune.wild.store import Store
from tests.support.wild_run import ten_words, write_run


def spoken(key, dense, small=None, **columns):
    """An item of ten words, of which the models have so many wrong."""
    heard = {"dense": ten_words(dense)}
    if small is not None:
        heard["small"] = None if small == "failed" else ten_words(small)
    return {"key": key, "reference": ten_words(0), "heard": heard, **columns}


@pytest.fixture
def data_of(tmp_path):
    def of(items):
        return summarise(write_run(tmp_path, items), samples=200).data

    return of


def test_figures_are_those_worked_out_by_hand(data_of):
    items = [
        *(spoken("a", 0, 1), spoken("b", 1, 3), spoken("c", 2, 2), spoken("d", 5, "failed"), spoken("e", 0)),
        {"key": "f", "reason": "the video is private"},
    ]
    data = data_of(items)
    dense, small = data["totals"]["all"]
    assert (dense["count"], dense["failures"], dense["missing"]) == (5, 1, 0)
    assert dense["mean"] == pytest.approx(0.16) and dense["median"] == pytest.approx(0.1)
    assert dense["sd"] == pytest.approx((((0.16**2) * 2 + 0.06**2 + 0.04**2 + 0.34**2) / 4) ** 0.5)
    assert dense["paired"] is None
    assert (small["count"], small["failures"], small["missing"]) == (3, 2, 1)
    assert small["pooled"] == pytest.approx(6 / 30)
    paired = small["paired"]
    assert paired["count"] == 3 and paired["mean"] == pytest.approx(0.1) and paired["median"] == pytest.approx(0.1)
    assert paired["pruned"] - paired["dense"] == pytest.approx(paired["mean"])
    assert 0 <= paired["interval"][0] < 0.1 < paired["interval"][1] <= 0.2 + 1e-9
    assert dense["real_time_factor"] == 0.5 and dense["peak_memory"] == 1000
    reasons = {(row["model"], row["reason"]): row["count"] for row in data["failures"]}
    assert reasons == {(None, "the video is private"): 1, ("small", "out of memory"): 1}


def test_long_items_count_more_in_the_pooled_rate_than_in_the_mean(data_of):
    long = {"key": "b", "reference": " ".join([ten_words(0)] * 9), "heard": {"dense": " ".join([ten_words(0)] * 9)}}
    (dense,) = data_of([spoken("a", 5), long])["totals"]["all"]
    assert dense["mean"] == pytest.approx(0.25) and dense["pooled"] == pytest.approx(0.05)


def test_intervals_follow_from_the_seed(tmp_path):
    run = write_run(tmp_path, [spoken(f"{n}", n % 4, n % 7) for n in range(20)])
    once, again, other = (
        summarise(run, samples=100, seed=seed).data["totals"]["all"][1]["paired"]["interval"] for seed in (0, 0, 1)
    )
    assert once == again != other


def test_the_first_model_of_a_run_is_the_dense_one(data_of):
    items = [{**spoken("a", 1), "heard": {"zebra": ten_words(0), "ant": ten_words(1)}}]
    data = data_of(items)
    assert data["dense"] == "zebra" and data["models"] == ["zebra", "ant"]


@pytest.mark.parametrize(
    ("dimension", "value", "name"),
    [
        ("duration", 9.9, "under 10 s"),
        ("duration", 10, "10 to 30 s"),
        ("duration", 5000, "20 min and more"),
        ("speaking_rate", 190, "190 and more (fast)"),
        ("loudness", -40.1, "under -40 (very quiet)"),
        ("loudness", -16, "-16 and more (loud)"),
    ],
)
def test_numbers_fall_into_named_bins(dimension, value, name):
    assert BINS[dimension].of(value) == name
    assert len(BINS[dimension].names) == len(BINS[dimension].edges) + 1


def test_slices_are_in_a_natural_order_and_what_is_not_known_is_a_slice_of_its_own(data_of):
    items = [spoken(f"{n}", 0, 1, conditions={"noise": noise}) for n, noise in enumerate(("20 dB", "5 dB", "10 dB"))]
    items += [spoken("q", 0, 1, duration=3.0), spoken("r", 0, 1, duration=700.0)]
    dimensions = data_of(items)["dimensions"]
    assert list(dimensions) == ["duration", "noise"]
    assert [part["name"] for part in dimensions["noise"]] == ["5 dB", "10 dB", "20 dB", "not stated"]
    assert [part["name"] for part in dimensions["duration"]] == ["under 10 s", "5 to 20 min", "not stated"]
    assert [part["items"] for part in dimensions["duration"]] == [1, 1, 3]


def test_rare_slices_stand_together_and_no_item_is_lost(data_of, monkeypatch):
    monkeypatch.setattr(report_slices, "MOST_SLICES", 4)
    items = [spoken(f"{n}", 0, 1, category=f"c{n}") for n in range(9)]
    parts = data_of(items)["dimensions"]["category"]
    assert len(parts) == 4 and sum(part["items"] for part in parts) == len(items)
    assert any(part["name"] == "6 rarer ones" for part in parts)


def test_several_plans_are_slices(tmp_path):
    write_run(tmp_path, [spoken("a", 0, 1)], plan="one")
    run = write_run(tmp_path, [spoken("a", 0, 2)], plan="two")
    data = summarise(run, samples=50).data
    assert data["plans"] == ["one", "two"] and [p["name"] for p in data["dimensions"]["plan"]] == ["one", "two"]


def test_slices_are_ranked_by_what_pruning_does_to_them_and_few_items_come_last(data_of):
    items = [spoken(f"a{n}", 1, 4 + n % 3, language="ar") for n in range(8)]
    items += [spoken(f"e{n}", n % 3, (n + 1) % 3, language="en") for n in range(9)]
    items += [spoken(f"d{n}", 0, 9, language="de") for n in range(2)]
    data = data_of(items)
    rows = data["ranked"]
    assert [row["slice"] for row in rows] == ["ar", "en", "de"]
    assert [row["certain"] for row in rows] == [True, False, False]
    assert [row["few"] for row in rows] == [False, False, True]
    worst = {row["place"]: row for row in data["worst"]}
    assert [worst[place]["pruned"] for place in rows[0]["worst"]] == [0.6, 0.6, 0.5]
    assert len(worst[rows[2]["worst"][0]]["columns"]) == 10


def test_where_pruning_hurts_nowhere_the_report_says_so(tmp_path):
    items = [spoken(f"{n}", 2, 2, language=("en", "de")[n % 2]) for n in range(12)]
    items += [spoken(f"x{n}", 2, 9) for n in range(9)]
    found = summarise(write_run(tmp_path, items), samples=50)
    assert {row["slice"] for row in found.data["ranked"]} == {"en", "de"}  # and not those whose language isn't known
    assert any("no slice has a higher word error rate" in line for line in notes(found.data))
    assert "wild_increase.png" not in found.files and found.data["worst"] == []
    assert "Where pruning hurts most" not in render_page(found.data)


def test_measures_that_are_no_numbers_count_as_failed(tmp_path):
    run = write_run(tmp_path, [spoken(f"{n}", 0, 1, duration=5.0) for n in range(4)])
    with sqlite3.connect(run) as database:
        database.execute("UPDATE result SET wer = 'high' WHERE item_id = 1 AND model = 'small'")
        database.execute("UPDATE result SET wer = 9e999 WHERE item_id = 2 AND model = 'small'")
        database.execute("UPDATE result SET wer = -1 WHERE item_id = 3 AND model = 'small'")
        database.execute("UPDATE item SET duration = 'long', conditions = '[1' WHERE id = 1")
        database.execute('UPDATE item SET conditions = \'{"a": "\\ud800", "b": null}\' WHERE id = 2')
    small = summarise(run, samples=50).data["totals"]["all"][1]
    assert (small["count"], small["failures"]) == (1, 3)


def test_the_files_are_there_and_the_database_is_as_it_was(tmp_path):
    items = [spoken(f"{n}", 1, 3, category=("=1+1", "$x_{")[n % 2], language="zh") for n in range(12)]
    run = write_run(tmp_path / "run", [{**item, "title": "视频 $\\frac"} for item in items])
    before = run.read_bytes()
    found = report(run.parent, samples=50)
    assert run.read_bytes() == before
    assert sorted(path.name for path in run.parent.iterdir()) == sorted([*found.files, "wild.sqlite"])
    assert json.loads((run.parent / "wild_report.json").read_text()) == json.loads(json.dumps(found.data))
    for picture in ("wild_wer.png", "wild_increase.png"):
        assert (run.parent / picture).read_bytes().startswith(b"\x89PNG")
    with open(run.parent / "wild_report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["dimension"] for row in rows} == {"all", "category", "language"}
    assert "'=1+1" in {row["slice"] for row in rows} and not any(row["slice"].startswith("=") for row in rows)
    assert float(next(row for row in rows if row["model"] == "small")["increase"]) == pytest.approx(0.2)


def test_one_model_alone_is_reported_and_an_older_picture_goes(tmp_path):
    run = write_run(tmp_path, [spoken("a", 1, language="en"), spoken("b", 2, language="de")])
    (tmp_path / "wild_increase.png").write_bytes(b"of an earlier report")
    found = report(run, samples=50)
    assert found.data["ranked"] == [] == found.data["worst"]
    assert "one model only" in (tmp_path / "wild_report.html").read_text()
    assert not (tmp_path / "wild_increase.png").exists()


def test_a_run_in_which_all_failed_is_reported(tmp_path):
    items = [{"key": "a", "reason": "no captions"}, {"key": "b", "reason": "no captions"}]
    found = report(write_run(tmp_path / "before", items), samples=50)
    assert found.data["models"] == [] and found.data["failures"][0]["count"] == 2
    found = report(write_run(tmp_path / "later", [{**spoken("a", 0), "heard": {"dense": None, "small": None}}]))
    assert [entry["failures"] for entry in found.data["totals"]["all"]] == [1, 1]
    assert found.data["totals"]["all"][1]["mean"] is None and found.data["ranked"] == []


def test_what_is_no_run_is_refused_with_a_line(tmp_path):
    with pytest.raises(DataError, match=r"wild\.sqlite' does not exist"):
        report(tmp_path)
    (tmp_path / "text.sqlite").write_text("this is no database, but it is long enough to look at " * 9)
    with pytest.raises(DataError, match="can't be read as a database"):
        report(tmp_path / "text.sqlite")
    with sqlite3.connect(tmp_path / "other.sqlite") as database:
        database.execute("CREATE TABLE plan (id INTEGER)")
    with pytest.raises(DataError, match="its table 'plan' has no column 'name'"):
        report(tmp_path / "other.sqlite")
    with Store(tmp_path / "empty.sqlite"):
        pass
    with pytest.raises(DataError, match="holds no items"):
        report(tmp_path / "empty.sqlite")
    with Store(tmp_path / "planned.sqlite") as store:
        store.add_item(store.add_plan("p", "folder", {}), "a", status="planned")
    with pytest.raises(DataError, match="none of its 1 items has been run"):
        report(tmp_path / "planned.sqlite")
    assert not list(tmp_path.glob("*report*"))


def test_an_output_that_is_a_file_is_refused_with_a_line(tmp_path):
    run = write_run(tmp_path, [spoken("a", 1)])
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(CheckpointError, match="can't write to"):
        report(run, tmp_path / "taken", samples=50)
    assert (tmp_path / "taken").read_text() == "mine"
