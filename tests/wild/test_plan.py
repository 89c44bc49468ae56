"""Plans: what stands in the file, which transcripts count, and what is said where there are none."""

import json
from datetime import timedelta

import pytest
from datasets import Dataset

from hfprune.errors import CheckpointError, ConfigError, DataError
from hfprune.speech.audio import write_audio
from hfprune.speech.captions import choose_language
from hfprune.wild.folder import plan_folder, reference_of
from hfprune.wild.plan import read_plan
from hfprune.wild.rows import Rows, plan_dataset
from tests.support.wild import recordings, sine


@pytest.mark.parametrize(
    ("available", "language", "chosen"),
    [
        (["en-US", "en", "de"], "en", "en"),
        (["en-CA", "en-US", "en-GB"], "en", "en-GB"),
        (["en-US", "en-CA"], "en", "en-US"),
        (["en-nP7-2PuUl7o", "en-AU", "en-CA"], "en", "en-AU"),
        (["de-AT", "en"], "de", "de-AT"),
        (["en", "de"], "en-AU", "en"),
        (["pt-PT", "pt"], "pt-BR", "pt"),
        (["zh-TW", "zh-HK"], "zh-CN", None),
        (["enm", "live_chat"], "en", None),
        ([], "en", None),
    ],
)
def test_the_reference_is_in_the_nearest_variety_of_the_language(available, language, chosen):
    assert choose_language(available, language) == chosen


def test_a_folder_becomes_a_plan_and_the_plan_is_read_again(tmp_path):
    folder = recordings(tmp_path / "in", a="one two", b=None, c=None)
    (folder / "b.en-GB.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\n<i>three</i> four\n")
    (folder / "b.de.vtt").write_text("WEBVTT\n\n00:00.000 --> 00:01.000\ndrei vier\n")
    write_audio(folder / "c.wav", sine(0.25))
    (recordings(folder / "music", d="five") / "note.md").write_text("no recording")
    row = {"file_name": "c.wav", "text": "six", "language": "en", "conditions": {"noise": "10 dB"}, "title": "C"}
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    made = plan_folder(folder, "en")
    made.write(tmp_path / "plan.json")
    plan = read_plan(tmp_path / "plan.json")
    assert plan == made and plan.name == "in"
    items = {item.key: item for item in plan.items}
    assert list(items) == ["a.wav", "b.wav", "c.wav", "music/d.wav"]
    assert items["c.wav"].duration == timedelta(seconds=0.25) and items["c.wav"].conditions == {"noise": "10 dB"}
    assert items["b.wav"].captions == "b.en-GB.srt" and items["b.wav"].default_audio_language == "en-GB"
    assert items["b.wav"].manually_created_transcripts == ["de", "en-GB"]
    assert items["music/d.wav"].category == "music"
    assert reference_of(plan, items["b.wav"], "en") == ("three four", "en-GB")
    assert reference_of(plan, items["b.wav"], "de") == ("drei vier", "de")
    assert reference_of(plan, items["c.wav"], "en") == ("six", "en")
    stored = json.loads((tmp_path / "plan.json").read_text())["items"][1]
    assert stored["manuallyCreatedTranscripts"] == ["de", "en-GB"] and stored["duration"] == "PT0.5S"


def test_what_cannot_be_tested_stays_with_the_reason(tmp_path):
    folder = recordings(tmp_path, good="one", mute=None, german=None)
    (folder / "german.de.txt").write_text("eins")
    (folder / "broken.mp3").write_bytes(b"this is no sound")
    (folder / "metadata.jsonl").write_text('{"file_name": "gone.wav", "text": "one"}\n')
    plan = plan_folder(folder, "en")
    reasons = {item.key: item.reason for item in plan.items if item.reason}
    assert reasons["mute.wav"] == "no transcript beside it (.srt, .vtt or .txt of the same name)"
    assert reasons["german.wav"] == "no transcript in 'en'; there is: de"
    assert "can't be decoded" in reasons["broken.mp3"] and reasons["gone.wav"] == "there is no such file"
    assert [item.key for item in plan.testable] == ["good.wav"]


def test_a_folder_in_which_nothing_is_found_is_one_line(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        plan_folder(tmp_path / "gone")
    with pytest.raises(DataError, match="nothing was found"):
        plan_folder(tmp_path)
    recordings(tmp_path, a=None, b=None)
    with pytest.raises(DataError, match="none of the 2 items can be tested: no transcript beside it"):
        plan_folder(tmp_path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1: not valid JSON"),
        ('{"text": "a"}', "line 1: not a JSON object with a `file_name`"),
        ('{"file_name": "../a.wav", "text": "a"}', "lies outside the folder"),
    ],
)
def test_metadata_that_cannot_be_used_is_one_line(tmp_path, line, words):
    (recordings(tmp_path, a="one") / "metadata.jsonl").write_text(line)
    with pytest.raises(DataError, match=words):
        plan_folder(tmp_path)


def test_several_languages_and_none_asked_for(tmp_path):
    folder = recordings(tmp_path, a="one", b=None)
    for code in ("de", "fr"):
        (folder / f"b.{code}.txt").write_text("text")
    plan = plan_folder(folder)
    assert plan.items[1].reason == "transcripts in several languages (de, fr): say which with --language"
    (folder / "b.txt").write_text("of no language")
    assert plan_folder(folder).items[1].captions == "b.txt"
    assert plan_folder(folder, "fr-CA").items[1].captions == "b.fr.txt"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ('{"items": []}', "is not a test plan: source"),
        ('{"source": "folder", "items": [{"title": "x"}]}', "items.0.key"),
        ('{"source": "youtube", "items": [{"key": "x"}, {"key": "x"}]}', "the item 'x' twice"),
        ('{"source": "folder", "items": [], "formatVersion": 9}', "formatVersion"),
        ('{"source": "folder", "items": []}', "'args' has no text 'folder'"),
        ('{"source": "dataset", "items": [], "args": {"dataset": "a", "split": 3}}', "'args' has no text 'split'"),
    ],
)
def test_what_is_no_plan_is_one_line(tmp_path, text, words):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(DataError, match=words):
        read_plan(tmp_path / "plan.json")
    with pytest.raises(DataError, match="can't be read"):
        read_plan(tmp_path / "gone.json")


def test_plans_of_mi_go_are_read(tmp_path):
    item = {"videoId": "aaaaaaaaaaa", "title": "A", "duration": "PT14M41S", "manuallyCreatedTranscripts": ["en"]}
    item["results"] = {"modelName": "m", "wer": 0.1}
    values = {"args": {"relevanceLanguage": "en", "maxResults": 10}, "etag": "x", "items": [item], "regionCode": "US"}
    (tmp_path / "Travel_en.json").write_text(json.dumps(values))
    plan = read_plan(tmp_path / "Travel_en.json")
    assert (plan.source, plan.name, plan.language, plan.region_code) == ("youtube", "Travel_en", "en", "US")
    (read,) = plan.items
    assert read.key == "aaaaaaaaaaa" and read.duration == timedelta(minutes=14, seconds=41)
    assert read.results == [{"modelName": "m", "wer": 0.1}]


def test_a_plan_that_cannot_be_written_is_one_line(tmp_path):
    plan = plan_folder(recordings(tmp_path, a="one"))
    with pytest.raises(CheckpointError, match="can't be written"):
        plan.write(tmp_path / "gone" / "plan.json")


@pytest.fixture
def parquet(tmp_path):
    write_audio(tmp_path / "a.wav", sine())
    sound = (tmp_path / "a.wav").read_bytes()
    rows = {
        "audio": [{"bytes": sound, "path": None}, {"bytes": None, "path": str(tmp_path / "a.wav")}, None],
        "sentence": ["one", "two", "three"],
        "category": ["News", "Music", "News"],
        "language": ["en", "de", "en"],
    }
    Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def test_a_dataset_becomes_a_plan(parquet):
    plan = plan_dataset(str(parquet), language="en")
    assert plan.args["textColumn"] == "sentence" and plan.args["split"] == "train" and plan.source == "dataset"
    assert [item.key for item in plan.items] == ["train/0", "train/1", "train/2"]
    second = plan.items[1]
    assert (second.text, second.category, second.default_audio_language) == ("two", "Music", "de")
    rows = Rows(plan)
    assert isinstance(rows.audio(plan.items[0]), bytes) and rows.audio(second).endswith("a.wav")
    with pytest.raises(DataError, match="holds no sound"):
        rows.audio(plan.items[2])
    assert len(plan_dataset(str(parquet), limit=1).items) == 1


def test_datasets_that_do_not_fit_are_one_line(parquet, tmp_path):
    with pytest.raises(ConfigError, match="no split 'tset'"):
        plan_dataset(str(parquet), split="tset")
    with pytest.raises(ConfigError, match="no column 'sentense'; did you mean 'sentence'"):
        plan_dataset(str(parquet), text_column="sentense")
    with pytest.raises(DataError, match="^no file or folder"):
        plan_dataset(str(tmp_path / "gone.parquet"))
    Dataset.from_dict({"words": ["a"]}).to_parquet(tmp_path / "text.parquet")
    with pytest.raises(DataError, match="no column of audio; there is: words"):
        plan_dataset(str(tmp_path / "text.parquet"))
