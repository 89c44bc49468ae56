"""`hfprune wild` as a user types it."""

import json

import pytest
from typer.testing import CliRunner

from hfprune.cli import app
from tests.support.wild import ctc, recordings


def call(*arguments):
    done = CliRunner().invoke(app, ["wild", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_plan_and_run_print_what_a_person_needs(recogniser, tmp_path):
    small = ctc(tmp_path / "small", seed=1)
    folder, plan, output = recordings(tmp_path / "in", a="one", b="two", c=None), tmp_path / "p.json", tmp_path / "out"
    done = call("plan", "folder", folder, "--language", "en", "--output", plan)
    assert done.exit_code == 0
    assert f"{plan}: 2 items to test" in done.stdout and "c.wav: no transcript beside it" in done.stdout
    done = call("run", plan, "--models", recogniser, small, "--output", output)
    assert done.exit_code == 0, done.output
    for words in ("dense", "small", "WER, mean", "real-time factor", "1 of 3 items could not be tested."):
        assert words in done.stdout
    assert "1 x no transcript beside it" in done.stdout and "2 a\n" in done.stderr
    again = call("run", plan, "--models", recogniser, "--models", small, "--output", output)
    assert again.exit_code == 0 and "loading" not in again.stderr
    assert [len(item["results"]) for item in json.loads(plan.read_text())["items"]] == [2, 2, 0]


def test_a_plan_is_not_written_over(tmp_path):
    folder, plan = recordings(tmp_path / "in", a="one"), tmp_path / "p.json"
    plan.write_text("mine")
    done = call("plan", "folder", folder, "--output", plan)
    assert done.exit_code == 2 and "exists, and may hold results" in done.stderr and plan.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "youtube"], "no key of the YouTube Data API"),
        (["plan", "folder", "gone"], "no folder 'gone'"),
        (["plan", "dataset", "gone.parquet"], "no file or folder 'gone.parquet'"),
        (["plan", "dataset", "nobody/nothing"], "'nobody/nothing' could not be reached on the Hub"),
        (["run", "gone.json", "--models", "m"], "the plan 'gone.json' can't be read"),
        (["run", "gone.json", "--models", "m", "--cache-size", "much"], "--cache-size: 'much' is no size"),
    ],
)
def test_bad_input_is_one_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("YOUTUBE_API_KEY", raising=False)
    done = call(*arguments)
    assert done.exit_code == 2 and done.stderr.startswith("error: ") and words in done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_titles_do_not_steer_the_terminal(recogniser, tmp_path):
    folder = recordings(tmp_path / "in", a="one")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.wav", "title": "\x1b[31m[/b] red\n"}))
    assert call("plan", "folder", folder, "--output", tmp_path / "p.json").exit_code == 0
    done = call("run", tmp_path / "p.json", "--models", recogniser, "--output", tmp_path / "out")
    assert done.exit_code == 0 and "0/1 [31m[/b] red\n" in done.stderr
