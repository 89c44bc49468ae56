"""The database of a wild run: what is written is read again, and nothing is twice."""

import sqlite3

import pytest

from hfprune.errors import CheckpointError, DataError
from hfprune.wild.store import Store


def test_what_is_written_is_read_again(tmp_path):
    with Store(tmp_path / "wild.sqlite") as store:
        plan = store.add_plan("p", "folder", {"folder": "x"}, created="2026-01-01T00:00:00+00:00")
        assert store.add_plan("p", "folder", {}, created="2026-01-01T00:00:00+00:00") == plan
        item = store.add_item(plan, "a.wav", title="A", conditions={"noise": "10 dB"}, status="planned")
        assert store.add_item(plan, "a.wav", status="ok", words=3) == item
        store.add_result(item, "dense", status="failed", reason="full")
        store.add_result(item, "dense", status="ok", wer=0.5)
    with Store(tmp_path / "wild.sqlite", make=False) as store:
        assert store.plans()[0]["parameters"] == {"folder": "x"}
        (row,) = store.items(plan)
        assert (row["title"], row["words"], row["status"], row["conditions"]) == ("A", 3, "ok", {"noise": "10 dB"})
        (result,) = store.results(plan)
        assert (result["status"], result["wer"], result["reason"]) == ("ok", 0.5, None)
        assert store.items(plan + 1) == [] == store.results(plan + 1)


def test_what_is_no_database_of_a_wild_run_is_refused_and_left_alone(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        Store(tmp_path / "none.sqlite", make=False)
    text = tmp_path / "text.sqlite"
    text.write_text("not a database, but rather a long text about one" * 40)
    with pytest.raises(DataError, match="can't be opened"):
        Store(text)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE item (id INTEGER)")
    with pytest.raises(DataError, match="'item' is another one"):
        Store(other)
    with sqlite3.connect(other) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("item",)]


def test_an_unknown_column_is_refused(tmp_path):
    with Store(tmp_path / "wild.sqlite") as store, pytest.raises(DataError, match="no column 'colour'"):
        store.add_item(store.add_plan("p", "folder", {}), "a", colour="red")


def test_a_full_disk_is_one_line_and_what_was_written_stays(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "wild.sqlite"
    with Store(path) as store:
        plan = store.add_plan("p", "folder", {})
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, before[1]))
        try:
            with pytest.raises(CheckpointError, match="can't be written: .*what was there stays"):
                store.add_item(plan, "a", title="x" * 100_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        store.add_item(plan, "b")
        assert [item["key"] for item in store.items()] == ["b"]
