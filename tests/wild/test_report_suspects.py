"""Suspect references and aligned transcripts."""

import re

import pytest

from hfprune.wild import summarise
from hfprune.wild.report_alignment import MOST_COLUMNS, align
from hfprune.wild.report_records import read_records
from hfprune.wild.report_suspects import guess, script, suspects, witnesses
from hfprune.wild.report_tables import notes
from tests.support.wild_run import ten_words, write_run

HEARD = "the quick brown fox jumps over the lazy dog and runs away from all the noise in town"
TALK = " ".join(f"word{n}" for n in range(30))


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (
            "быстрая лиса прыгает через ленивую собаку и убегает",
            "another language: Cyrillic script, and the models wrote",
        ),
        ("der schnelle braune fuchs springt über den faulen hund und läuft weg", "hardly a word is shared"),
        (", ".join(f"keyword{n}" for n in range(25)), "list of keywords"),
        (" ".join(["free", "movie", "hd", "online"][n * n % 7 % 4] for n in range(60)), "lyrics|list of keywords"),
        ("oh my love stay with me tonight " * 8, "lyrics"),
        (" ".join(f"{HEARD} and{n}" for n in range(5)), "too many words for its length: 95, and the models heard 18"),
        ("the quick fox", "too few words for its length: 3"),
        ("the brown dog was jumping quickly over lazy foxes in a loud town", "other wording"),
    ],
)
def test_guesses_say_what_a_reference_may_be(reference, words):
    said = re.sub(r"[^\w ]", "", reference)
    assert re.search(words, "; ".join(guess(reference, said, [HEARD, HEARD])))


def test_the_length_of_a_recording_tells_of_too_many_words():
    said = " ".join(f"w{n}" for n in range(40))
    assert guess(said, said, [said], 60.0) == ["other wording, or a part of the speech: some words are shared"]
    assert guess(said, said, [said], 4.0) == ["too many words for its length: 40, and the models heard 40"]
    assert guess(said, said, [said], 600.0) == ["too few words for its length: 40, and the models heard 40"]


@pytest.mark.parametrize(
    ("text", "name"),
    [("Hello мир", "Latin"), ("こんにちは 世界", "Chinese or Japanese"), ("שלום", "Hebrew"), ("123 !", None)],
)
def test_scripts_are_told_by_most_letters(text, name):
    assert script(text) == name


def usual(number):
    return {"key": f"u{number}", "reference": ten_words(0), "heard": {m: ten_words(1) for m in ("dense", "small")}}


def doubtful(small=TALK):
    return {"key": "s", "reference": " ".join(f"other{n}" for n in range(30)), "heard": {"dense": TALK, "small": small}}


def test_items_on_which_models_agree_against_the_subtitle_are_suspect_and_stay_in(tmp_path):
    run = write_run(tmp_path, [*(usual(n) for n in range(4)), doubtful()])
    data = summarise(run, samples=50).data
    (row,) = data["suspects"]
    assert row["title"] == "s" and row["least_wer"] == 1.0 and row["apart"] == 0.0
    assert row["wer"] == {"dense": 1.0, "small": 1.0} and "hardly a word" in row["guesses"][0]
    assert [entry["count"] for entry in data["totals"]["all"]] == [5, 5]
    assert [entry["count"] for entry in data["totals"]["without_suspects"]] == [4, 4]
    assert data["totals"]["all"][0]["mean"] == pytest.approx(0.28)
    assert data["totals"]["without_suspects"][0]["mean"] == pytest.approx(0.1)


def test_models_that_disagree_with_each_other_make_no_suspect(tmp_path):
    other = " ".join(f"third{n}" for n in range(30))
    assert suspects(read_records(write_run(tmp_path, [*(usual(n) for n in range(4)), doubtful(other)]))) == []


def test_a_model_that_has_lost_its_hearing_is_no_witness(tmp_path):
    items = [*(usual(n) for n in range(4)), doubtful()]
    for item in items:
        item["heard"]["deaf"] = "x"
    records = read_records(write_run(tmp_path, items))
    assert witnesses(records) == ("dense", "small")
    assert [suspect.item.title for suspect in suspects(records)] == ["s"]


@pytest.mark.parametrize("heard", ["", "thank you so much"])
def test_models_that_agree_on_silence_or_a_few_words_make_no_suspect(tmp_path, heard):
    item = {**doubtful(), "heard": {"dense": heard, "small": heard}}
    assert suspects(read_records(write_run(tmp_path, [*(usual(n) for n in range(4)), item]))) == []


def test_models_that_hear_nothing_make_no_suspects_and_the_report_says_so(tmp_path):
    items = [{**usual(n), "heard": {"dense": TALK, "small": TALK}} for n in range(5)]
    data = summarise(write_run(tmp_path, items), samples=50).data
    assert data["suspects"] == [] == data["witnesses"] and data["totals"]["without_suspects"] is None
    assert any("fewer than two models hear well enough" in line for line in notes(data))


def test_one_model_alone_finds_no_suspect(tmp_path):
    item = doubtful()
    del item["heard"]["small"]
    assert suspects(read_records(write_run(tmp_path, [item]))) == []


def test_an_alignment_marks_hits_substitutions_deletions_and_insertions():
    found = align("a b c d", ["a b c d", "a x c e"])
    assert [column.reference for column in found["columns"]] == ["a", "b", "c", "d"]
    assert [cells[1] for _, cells in found["columns"]] == [
        ("a", "hit"), ("x", "substituted"), ("c", "hit"), ("e", "substituted")
    ]  # fmt: skip
    found = align("a b c", ["a b", "so a b c and on"])
    assert [column.reference for column in found["columns"]] == ["", "a", "b", "c", ""]
    assert found["columns"][0].cells == (None, ("so", "inserted"))
    assert found["columns"][3].cells == (("", "deleted"), ("c", "hit"))
    assert found["columns"][4].cells == (None, ("and on", "inserted"))


def test_of_a_long_alignment_the_part_is_shown_where_the_pruned_model_does_worst():
    said = [f"w{n}" for n in range(500)]
    heard = [*said[:300], *("x" for _ in range(40)), *said[340:]]
    found = align(" ".join(said), [" ".join(said), " ".join(heard)])
    assert len(found["columns"]) == MOST_COLUMNS
    assert found["before"] + MOST_COLUMNS + found["after"] == 500
    assert sum(column.cells[1].kind == "substituted" for column in found["columns"]) == 40


def test_an_empty_transcript_is_aligned():
    assert [column.cells[0].kind for column in align("a b", [""])["columns"]] == ["deleted", "deleted"]
    assert align("", ["a"])["columns"] == []
