"""The run: what is measured, what goes on after an interruption, and how failures become rows."""

import errno
import json
import os
import shutil
import time

import av
import jiwer
import pytest
from datasets import Dataset

from hfprune.errors import CheckpointError, ConfigError, DataError, ModelError
from hfprune.speech.audio import write_audio
from hfprune.wild import run as running
from hfprune.wild.folder import plan_folder
from hfprune.wild.plan import read_plan
from hfprune.wild.recogniser import Recogniser, Transcription
from hfprune.wild.rows import plan_dataset
from hfprune.wild.run import Settings, names_of, run
from hfprune.wild.store import Store
from tests.support.wild import ctc, recordings, sine, whisper


def planned(folder, tmp_path, language="en"):
    path = tmp_path / "plan.json"
    plan_folder(folder, language).write(path)
    return path


def rows_of(output):
    with Store(output / "wild.sqlite", make=False) as store:
        return {item["key"]: item for item in store.items()}, store.results()


class Spoken:
    """A recogniser that says one thing, and counts how often it was asked."""

    said = "one two"
    fails_at = None
    heard: list[str] = []

    def __init__(self, name, **_):
        self.name = name

    def transcribe(self, samples, language=None):
        type(self).heard.append(self.name)
        if len(self.heard) == self.fails_at:
            raise KeyboardInterrupt
        return Transcription(self.said, 0.01, 1000)


@pytest.fixture
def spoken(monkeypatch):
    kind = type("Spoken", (Spoken,), {"heard": []})
    monkeypatch.setattr(running, "Recogniser", kind)
    return kind


def test_models_are_measured_as_jiwer_measures(recogniser, tmp_path):
    other = ctc(tmp_path / "small", seed=1)
    plan = planned(recordings(tmp_path / "in", a="He's got 20 %.", b="two"), tmp_path)
    told = []
    number = run(plan, [str(recogniser), str(other)], tmp_path / "out", tell=lambda *line: told.append(line))
    items, results = rows_of(tmp_path / "out")
    assert [row["model"] for row in results] == ["dense", "small"] * 2
    a = items["a.wav"]
    assert (a["status"], a["words"], a["reference_language"]) == ("ok", 4, "en")
    assert a["duration"] == 0.5 and a["speaking_rate"] == pytest.approx(480) and -14 < a["loudness"] < -13
    assert a["url"].endswith("in/a.wav")
    for row in results:
        assert row["status"] == "ok" and row["reason"] is None and row["peak_memory"] > 1e6
        exact = jiwer.process_words(row["reference_normalised"], row["hypothesis_normalised"])
        for measure in ("wer", "mer", "wil", "wip", "hits", "substitutions", "deletions", "insertions"):
            assert row[measure] == pytest.approx(getattr(exact, measure))
        assert row["real_time_factor"] == pytest.approx(row["seconds"] / 0.5)
    assert next(row for row in results if row["item_id"] == a["id"])["reference_normalised"] == "he has got 20"
    entries = {item.key: item.results for item in read_plan(plan).items}["a.wav"]
    assert [entry["modelName"] for entry in entries] == ["dense", "small"]
    assert entries[0]["wer"] == results[0]["wer"] and entries[0]["segments"][0][1] <= 0.5
    assert number == 1 and told[-1][1:] == (1, 2)


def test_the_reference_goes_first(spoken, tmp_path):
    spoken.said = "the quick fox"
    reference = "the quick brown fox jumps over a lazy dog this morning"
    run(planned(recordings(tmp_path / "in", a=reference), tmp_path), ["m"], tmp_path / "out")
    _, (row,) = rows_of(tmp_path / "out")
    assert (row["hits"], row["substitutions"], row["deletions"], row["insertions"]) == (3, 0, 8, 0)
    assert row["wer"] == pytest.approx(8 / 11) and row["words"] == 11


def test_a_second_run_does_only_what_is_missing(spoken, tmp_path):
    plan = planned(recordings(tmp_path / "in", a="one two", b="two", c="three"), tmp_path)
    spoken.fails_at = 4
    with pytest.raises(KeyboardInterrupt):
        run(plan, ["x", "y"], tmp_path / "out", Settings(workers=1))
    assert len(rows_of(tmp_path / "out")[1]) == 3
    assert sum(len(item.results) for item in read_plan(plan).items) == 3
    spoken.heard.clear()
    spoken.fails_at = None
    run(plan, ["x", "y"], tmp_path / "out")
    assert sorted(spoken.heard) == ["x", "y", "y"]
    assert len(rows_of(tmp_path / "out")[1]) == 6
    run(plan, ["x", "y", "z"], tmp_path / "out")
    assert spoken.heard[3:] == ["z"] * 3
    run(plan, ["x", "y", "z"], tmp_path / "out")
    assert len(spoken.heard) == 6
    assert all(len(item.results) == 3 for item in read_plan(plan).items)


def test_failures_are_rows_and_the_run_goes_on(spoken, tmp_path, monkeypatch):
    folder = recordings(tmp_path / "in", good="one two", empty="[music]", late=None, broken="x", full="x", mute=None)
    (folder / "late.en.txt").write_text("late")
    plan = planned(folder, tmp_path)
    (folder / "late.en.txt").unlink()
    (folder / "late.de.txt").write_text("spät")
    (folder / "broken.wav").write_bytes(b"no sound")
    read = running.Preparer.prepare

    def prepare(self, item):
        if item.key == "full.wav":
            raise OSError(errno.ENOSPC, "No space left on device", "full.wav")
        return read(self, item)

    monkeypatch.setattr(running.Preparer, "prepare", prepare)
    run(plan, ["m"], tmp_path / "out")
    items, results = rows_of(tmp_path / "out")
    assert items["good.wav"]["status"] == "ok" and len(results) == 1
    reasons = {key: item["reason"] for key, item in items.items() if item["status"] == "failed"}
    assert reasons["empty.wav"] == "the reference is empty"
    assert reasons["late.wav"] == "no transcript in 'en'; there is: de"
    assert "can't be decoded" in reasons["broken.wav"]
    assert reasons["full.wav"] == "No space left on device: full.wav"
    assert reasons["mute.wav"].startswith("no transcript beside it")
    monkeypatch.undo()
    monkeypatch.setattr(running, "Recogniser", spoken)
    (folder / "mute.txt").write_text("now there")
    run(plan, ["m"], tmp_path / "out")
    assert len(rows_of(tmp_path / "out")[1]) == 1
    run(plan, ["m"], tmp_path / "out", Settings(retry=True))
    items, results = rows_of(tmp_path / "out")
    assert {key for key, item in items.items() if item["status"] == "ok"} == {"good.wav", "full.wav", "mute.wav"}
    assert len(results) == 3 and items["mute.wav"]["reason"] is None
    told = {item.key: (item.reason, item.failure) for item in read_plan(plan).items}
    assert told["mute.wav"] == (None, None) and told["empty.wav"] == (None, "the reference is empty")


def test_an_item_that_others_have_heard_stays_when_it_is_gone(spoken, tmp_path):
    folder = recordings(tmp_path / "in", a="one two")
    plan = planned(folder, tmp_path)
    run(plan, ["x"], tmp_path / "out")
    (folder / "a.wav").unlink()
    run(plan, ["x", "y"], tmp_path / "out")
    items, (first, second) = rows_of(tmp_path / "out")
    assert items["a.wav"]["status"] == "ok" and first["wer"] == 0
    assert second["status"] == "failed" and "No such file" in second["reason"]


def test_a_reference_in_another_language_is_a_reason(spoken, tmp_path):
    folder = recordings(tmp_path / "in", a=None, b="two")
    line = {"file_name": "a.wav", "text": "eins", "language": "de"}
    (folder / "metadata.jsonl").write_text(json.dumps(line))
    run(planned(folder, tmp_path), ["m"], tmp_path / "out", Settings(language="en"))
    assert rows_of(tmp_path / "out")[0]["a.wav"]["reason"] == "the reference is in 'de', not in 'en'"
    run(tmp_path / "plan.json", ["m"], tmp_path / "own")
    items, results = rows_of(tmp_path / "own")
    assert items["a.wav"]["reference_language"] == "de" and len(results) == 2


def test_video_is_heard(spoken, tmp_path):
    with av.open(str(tmp_path / "clip.mkv"), "w") as container:
        picture, sound = container.add_stream("mpeg4", rate=10), container.add_stream("pcm_s16le", rate=16_000)
        picture.width = picture.height = 16
        picture.pix_fmt, sound.layout = "yuv420p", "mono"
        frame = av.AudioFrame.from_ndarray((sine(1.0)[None] * 32767).astype("int16"), "s16", "mono")
        frame.sample_rate = 16_000
        shown = av.VideoFrame(16, 16, "yuv420p")
        for stream, frames in ((picture, (shown, None)), (sound, (frame, None))):
            for part in frames:
                container.mux(stream.encode(part))
    (tmp_path / "clip.en.vtt").write_text("WEBVTT\n\n00:00.000 --> 00:01.000\n<v Ann>one two\n")
    run(planned(tmp_path, tmp_path), ["m"], tmp_path / "out")
    items, (row,) = rows_of(tmp_path / "out")
    assert items["clip.mkv"]["duration"] == pytest.approx(1.0, abs=0.01) and row["wer"] == 0


def test_a_model_that_changed_is_heard_again(spoken, tmp_path):
    plan = planned(recordings(tmp_path / "in", a="one two"), tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    for later in (-10, -10, 10):
        os.utime(tmp_path / "m" / "config.json", (time.time() + later,) * 2)
        run(plan, [str(tmp_path / "m")], tmp_path / "out")
    assert len(spoken.heard) == 2 and len(rows_of(tmp_path / "out")[1]) == 1


def test_a_plan_does_not_reach_out_of_its_folder(spoken, tmp_path):
    folder = recordings(tmp_path / "in", a="one two")
    plan = plan_folder(recordings(tmp_path / "other", b="two"))
    plan.items[0].key = "../in/a.wav"
    plan.write(tmp_path / "plan.json")
    run(tmp_path / "plan.json", ["m"], tmp_path / "out")
    assert "lies outside" in rows_of(tmp_path / "out")[0]["../in/a.wav"]["reason"] and folder.is_dir()


def test_a_model_that_is_no_recogniser_fails_its_rows_alone(recogniser, tmp_path):
    other = shutil.copytree(recogniser, tmp_path / "bert")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    plan = planned(recordings(tmp_path / "in", a="one"), tmp_path)
    run(plan, [str(recogniser), str(other)], tmp_path / "out")
    _, (good, bad) = rows_of(tmp_path / "out")
    assert good["status"] == "ok" and bad["status"] == "failed"
    assert "is not a speech recogniser: it holds BertModel" in bad["reason"]
    with pytest.raises(ModelError, match="none of the models can transcribe: .*no such folder"):
        run(plan, [str(tmp_path / "gone")], tmp_path / "out2")
    (other / "config.json").write_text(json.dumps(config))
    empty = dict.fromkeys(("truncation", "padding", "pre_tokenizer", "post_processor", "decoder"))
    unknown = {"version": "1.0", "added_tokens": [], "normalizer": {"type": "Odd"}, "model": {"type": "Odd"}} | empty
    (other / "tokenizer.json").write_text(json.dumps(unknown))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="lacks its feature extractor or tokenizer"):
        Recogniser(str(other))
    (other / "tokenizer.json").unlink()
    (other / "vocab.json").unlink()
    (other / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="lacks its feature extractor or tokenizer"):
        Recogniser(str(other))


def test_a_folder_that_is_gone_fails_no_item(spoken, tmp_path):
    folder = recordings(tmp_path / "in", a="one two")
    plan = planned(folder, tmp_path)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="the plan's folder '.*in' is not there"):
        run(plan, ["m"], tmp_path / "out")
    (tmp_path / "elsewhere").rename(folder)
    run(plan, ["m"], tmp_path / "out")
    assert [row["wer"] for row in rows_of(tmp_path / "out")[1]] == [0]


def test_a_model_that_breaks_on_an_item_fails_that_row(spoken, tmp_path):
    def transcribe(self, samples, language=None):
        if len(samples) > 8000:
            raise RuntimeError("kernel size can't be greater\nthan the input")
        return Transcription("two", 0.01, None)

    spoken.transcribe = transcribe
    folder = recordings(tmp_path / "in", a="one", b="two")
    running_plan = planned(folder, tmp_path)
    write_audio(folder / "a.wav", sine(1.0))
    run(running_plan, ["m"], tmp_path / "out")
    items, results = rows_of(tmp_path / "out")
    found = {row["item_id"]: row for row in results}
    assert found[items["a.wav"]["id"]]["reason"] == "RuntimeError: kernel size can't be greater"
    assert found[items["b.wav"]["id"]]["wer"] == 0
    assert items["a.wav"]["status"] == "ok"


def test_rows_of_a_dataset_are_heard(spoken, tmp_path):
    folder = recordings(tmp_path / "in", a="x")
    rows = {"audio": [{"bytes": (folder / "a.wav").read_bytes(), "path": None}, None], "text": ["one two", "two"]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    plan_dataset(str(tmp_path / "rows.parquet"), language="en").write(tmp_path / "plan.json")
    run(tmp_path / "plan.json", ["m"], tmp_path / "out")
    items, (row,) = rows_of(tmp_path / "out")
    assert row["wer"] == 0 and items["train/1"]["reason"] == "the row holds no sound"


def test_long_recordings_are_heard_whole_with_times(recogniser, tmp_path):
    found = Recogniser(str(recogniser), chunk=1.0, batch_size=3).transcribe(sine(3.0))
    assert found.segments[-1][1] == pytest.approx(3.0, abs=0.05)
    heard = Recogniser(str(whisper(tmp_path / "whisper")), batch_size=2)
    found = heard.transcribe(sine(1.5), "en")
    assert heard.chunk == 1.0 and max(stop or 0 for _, stop, _ in found.segments) > 1.0
    with pytest.raises(DataError, match="does not know the language 'fr'"):
        heard.transcribe(sine(), "fr")


def test_models_have_names_that_tell_them_apart(tmp_path):
    for name in ("a/dense", "b/dense", "pruned"):
        (tmp_path / name).mkdir(parents=True)
    folders = [str(tmp_path / name) for name in ("a/dense", "b/dense", "pruned")]
    assert list(names_of([*folders, "owner/tiny"], []).values()) == ["a/dense", "b/dense", "pruned", "owner/tiny"]
    known = [{"folder": folders[0], "model": "dense"}]
    assert list(names_of(folders[:2], known).values()) == ["dense", "b/dense"]
    with pytest.raises(ConfigError, match="is given twice"):
        names_of([folders[0], folders[0]], [])


def test_bad_arguments_are_one_line(tmp_path):
    plan = planned(recordings(tmp_path / "in", a="one"), tmp_path)
    with pytest.raises(ConfigError, match="--models: none given"):
        run(plan, [], tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="can't write to"):
        run(plan, ["m"], tmp_path / "file" / "out")
