"""Recordings in folders and tables: which transcript is whose, and what is left out and why."""

import json

import numpy as np
import pytest
import torch
from datasets import Audio, Dataset, Features, Value
from pyarrow import parquet

from hfprune.data import open_data, prepare
from hfprune.errors import ConfigError, DataError, ModelError
from hfprune.recipe import DataSection
from hfprune.scratch_speech import small_wav2vec2, small_whisper
from hfprune.speech.audio import read_audio, seconds_of, write_audio
from hfprune.speech.captions import Caption, joined
from hfprune.speech.recognisers import texts_of
from hfprune.speech.recordings import read_recordings
from tests.speech.sounds import record, spoken

TINY = {"hidden_size": 16, "intermediate_size": 24, "heads": 2}


def section(folder, **more):
    return DataSection(name=str(folder), task="speech-recognition", **more)


def prepared(folder, made=None, **more):
    model, processor = made or small_wav2vec2(**TINY, layers=1, channels=8, letters="abc")
    return prepare(open_data(section(folder, **more), 0), model, processor, 0)


def texts(data, processor):
    return sorted(processor.tokenizer.decode(row["labels"], group_tokens=False) for row in data)


def test_transcripts_beside_their_recordings(tmp_path):
    write_audio(tmp_path / "one.wav", spoken("ab"))
    (tmp_path / "one.txt").write_text("plain")
    (tmp_path / "one.en-GB.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nBritish\n")
    (tmp_path / "one.de.txt").write_text("deutsch")
    (tmp_path / "one.two.txt").write_text("of another recording")
    (tmp_path / "below").mkdir()
    write_audio(tmp_path / "below" / "two.wav", spoken("a"))
    found = read_recordings(tmp_path)
    assert [(item.path.name, item.text, item.language) for item in found] == [
        ("two.wav", None, None),
        ("one.wav", "plain", None),
    ]
    by_language = {language: read_recordings(tmp_path, language)[1] for language in ("de", "en", "fr")}
    assert {language: item.text for language, item in by_language.items()} == {
        "de": "deutsch",
        "en": "British",
        "fr": "plain",
    }
    assert by_language["en"].language == "en-GB"
    (tmp_path / "one.txt").unlink()
    assert read_recordings(tmp_path, "fr")[1].text is None
    with pytest.raises(DataError, match=r"transcripts in several languages \(de, en-GB, two\): say which with data"):
        read_recordings(tmp_path)
    (tmp_path / ".thumbnails").mkdir()
    write_audio(tmp_path / ".thumbnails" / "no.wav", spoken("a"))
    assert len(read_recordings(tmp_path, "de")) == 2


def test_a_table_goes_before_what_lies_beside(tmp_path):
    write_audio(tmp_path / "one.wav", spoken("ab"))
    (tmp_path / "one.txt").write_text("beside")
    rows = [{"file_name": "one.wav", "transcription": "in the table", "language": "en", "category": "news"}]
    rows += [{"file_name": "below/two.wav", "text": 1984}]
    (tmp_path / "below").mkdir()
    write_audio(tmp_path / "below" / "two.wav", spoken("ab"))
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    number, item = read_recordings(tmp_path)
    assert (number.key, number.text) == ("below/two.wav", "1984")
    assert (item.text, item.language, item.facts) == ("in the table", "en", {"category": "news"})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1: not valid JSON"),
        ('{"text": "a"}', "line 1: not a JSON object with a `file_name`"),
        ('{"file_name": "../x.wav"}', "line 1: .* lies outside the folder"),
        ('{"file_name": "x.wav"}', "names 'x.wav', which is not there"),
    ],
)
def test_a_table_that_is_wrong(line, words, tmp_path):
    write_audio(tmp_path / "one.wav", spoken("ab"))
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(DataError, match=words):
        read_recordings(tmp_path)


def test_splits_are_folders_or_said_in_the_table(tmp_path):
    record(tmp_path / "a" / "train", 3)
    record(tmp_path / "a" / "test", 2)
    raw = open_data(section(tmp_path / "a"), 0)
    assert (len(raw.train), len(raw.evaluation)) == (3, 2)
    record(tmp_path / "b", 4)
    rows = [{"file_name": f"00{n}.wav", "text": "ab", "split": "test" if n == 3 else "train"} for n in range(4)]
    (tmp_path / "b" / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    raw = open_data(section(tmp_path / "b"), 0)
    assert (len(raw.train), len(raw.evaluation)) == (3, 1)
    record(tmp_path / "c", 5)
    raw = open_data(section(tmp_path / "c", eval_fraction=0.4), 0)
    assert (len(raw.train), len(raw.evaluation)) == (3, 2)


def test_rows_and_batches_for_ctc(tmp_path):
    record(tmp_path, 3)
    write_audio(tmp_path / "000.wav", spoken("abca", 8_000), 8_000)
    data = prepared(tmp_path, eval_fraction=0.3)
    rows = [*data.train, *data.evaluation]
    batch = data.collator(rows)
    lengths = [len(row["input_values"]) for row in rows]
    assert max(lengths) == len(spoken("abca")) and batch["input_values"].shape == (3, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["labels"].shape == (3, 2) and data.facts == {"sampling_rate": 16_000}
    assert abs(float(batch["input_values"][0, : lengths[0]].mean())) < 1e-3  # the extractor's normalisation


def test_rows_and_batches_for_a_decoder(tmp_path):
    record(tmp_path, 3)
    (tmp_path / "000.txt").write_text("größer")
    model, processor = small_whisper(**TINY, seconds=1, mel_bins=8, longest_text=16)
    data = prepared(tmp_path, (model, processor), eval_fraction=0.3)
    batch = data.collator([*data.train, *data.evaluation])
    assert batch["input_features"].shape == (3, 8, 100)
    start, end = model.config.decoder_start_token_id, model.config.eos_token_id
    for asked, given in zip(batch["labels"], batch["decoder_input_ids"], strict=True):
        asked = asked[asked >= 0]
        assert asked[-1] == end and start not in asked
        assert given[: len(asked)].tolist() == [start, *asked[:-1].tolist()]
    assert "größer" in texts_of(processor, batch["labels"], labels=True)
    assert torch.isfinite(model(**batch).loss)


def test_what_can_not_be_used_is_left_out_and_counted(tmp_path):
    record(tmp_path, 10)
    (tmp_path / "000.txt").unlink()
    (tmp_path / "009.txt").write_text(" ")
    (tmp_path / "001.txt").write_text("...")
    (tmp_path / "002.wav").write_bytes(b"RIFF and no more")
    write_audio(tmp_path / "003.wav", spoken("abc" * 10))
    (tmp_path / "004.txt").write_text("abc" * 30)
    data = prepared(tmp_path, max_seconds=2, eval_fraction=0.5)
    assert len(data.train) + len(data.evaluation) == 4
    said = data.facts["left_out"]
    assert said.startswith("6 of 10 recordings are left out: ")
    for reason in ("2 without a text", "1 with a text of which no word is left", "1 longer than 2 s",
                   "1 too short for the model or their text", "1 that can't be decoded (the first: '"):  # fmt: skip
        assert reason in said
    with pytest.raises(DataError, match=r"no recording to train on; left out: .*longer than 0.01 s"):
        prepared(tmp_path, max_seconds=0.01)


def long_recording(path, *words, pause=0.0, kind="srt"):
    """A recording of words one after the other, with a caption for each."""
    path.parent.mkdir(exist_ok=True)
    parts, lines, now = [], [], 0.0
    for number, word in enumerate(words, start=1):
        parts += [spoken(word), np.zeros(int(16_000 * pause), np.float32)]
        stop = now + len(parts[-2]) / 16_000
        lines.append(f"{number}\n00:00:{now:06.3f} --> 00:00:{stop:06.3f}\n{word}\n".replace(".", ","))
        now = stop + pause
    write_audio(path, np.concatenate(parts))
    path.with_suffix(f".{kind}").write_text("WEBVTT\n\n" * (kind == "vtt") + "\n".join(lines).replace(",", "."))


@pytest.mark.parametrize("room", [None, 0])
@pytest.mark.parametrize("kind", ["srt", "vtt"])
def test_long_recordings_are_cut_at_their_captions(room, kind, tmp_path, monkeypatch):
    if room is not None:
        monkeypatch.setattr("hfprune.data.speech.KEPT_BYTES", room)
    words = ["ab", "bc", "abcabcab", "ca", "cb", "aa"]
    long_recording(tmp_path / "train" / "one.wav", *words, pause=0.2, kind=kind)
    long_recording(tmp_path / "test" / "two.wav", "ab", "ca", kind=kind)
    decoded = []
    monkeypatch.setattr("hfprune.data.speech.read_audio", lambda *args: decoded.append(args) or read_audio(*args))
    made = small_wav2vec2(**TINY, layers=1, channels=8, letters="abc")
    data = prepared(tmp_path, made, max_seconds=0.9)
    assert len(decoded) == (2 if room is None else 0)
    assert texts(data.train, made[1]) == ["aa", "ab bc", "ca cb"] and texts(data.evaluation, made[1]) == ["ab ca"]
    assert data.facts["left_out"] == "1 of 5 recordings and clips are left out: 1 whose caption is longer than 0.9 s"
    decoded.clear()
    clip = data.train.clips[1]
    heard = clip.read(16_000)
    word = spoken("ca")
    assert len(heard) == len(word) * 2 + 3_200 == round((clip.stop - clip.start) * 16_000)
    assert np.allclose(heard[: len(word)], word, atol=1e-3)
    assert len(decoded) == (0 if room is None else 1)
    assert all(len(row["input_values"]) <= 0.9 * 16_000 for row in data.train)
    if room is None:  # the whole recording is not held on to
        assert all(clip.samples.base is None for clip in data.train.clips)


def test_captions_that_can_not_be_clips_are_left_out_and_counted(tmp_path):
    record(tmp_path, 4)
    long_recording(tmp_path / "long.wav", "ab", "...", "bc", "ca", pause=0.5)
    with (tmp_path / "long.srt").open("a") as file:
        file.write("\n9\n00:01:00,000 --> 00:01:01,000\nab\n")
    long_recording(tmp_path / "untimed.wav", "ab", "bc", "ca", pause=0.5)
    (tmp_path / "untimed.srt").rename(tmp_path / "untimed.txt")
    long_recording(tmp_path / "broken.wav", "ab", "bc", "ca")
    (tmp_path / "broken.wav").write_bytes(b"no sound")
    data = prepared(tmp_path, max_seconds=0.5, eval_fraction=0.3)
    assert len(data.train) + len(data.evaluation) == 7
    said = data.facts["left_out"]
    assert said.startswith("4 of 11 recordings and clips are left out: ")
    assert "1 longer than 0.5 s" in said and "1 with a text of which no word is left" in said
    assert "1 whose caption lies outside of its recording" in said and "1 that can't be decoded (the first: '" in said


def test_a_decoder_hears_clips_no_longer_than_it_can(tmp_path):
    long_recording(tmp_path / "train" / "one.wav", "ab", "bc", "ca", "cb", pause=0.1)
    long_recording(tmp_path / "test" / "two.wav", "ab")
    model, processor = small_whisper(**TINY, seconds=1, mel_bins=8, longest_text=16)
    data = prepared(tmp_path, (model, processor))
    rows = [data.train[index]["labels"] for index in range(len(data.train))]
    assert texts_of(processor, rows, labels=True) == ["ab bc", "ca cb"] and "left_out" not in data.facts


def captions_at(*lines):
    return [Caption(*line) for line in lines]


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([(0, 1, "a"), (1, 2, "b"), (2, 3, "c")], [(0, 2, "a b"), (2, 3, "c")]),
        ([(1, 2, "b"), (0, 1, "a")], [(0, 2, "a b")]),  # in their order in time
        ([(0, 9, "a"), (9, 10, "b")], [(0, 9, "a"), (9, 10, "b")]),  # too long alone, and stays alone
        ([(0, 1.5, "a"), (1, 3, "b"), (3, 4, "c")], [(0, 3, "a b"), (3, 4, "c")]),  # two who speak at once
        ([(0, 1, "a"), (1, 2, "a"), (2, 3, "b")], [(0, 2, "a"), (2, 3, "b")]),  # one line, shown on
        ([(0, 0.5, "a"), (1.5, 2, "a")], [(0, 2, "a a")]),  # said twice
        ([(0, 1, "a"), (0.95, 2, "b"), (2, 3, "c")], [(0, 2, "a b"), (2, 3, "c")]),
        ([(0, 2, "a"), (1.95, 3, "b")], [(0, 2, "a"), (1.95, 3, "b")]),  # hardly overlapping
    ],
)
def test_captions_are_joined(lines, found):
    assert joined(captions_at(*lines), 2.0) == captions_at(*found)


def test_texts_are_written_with_the_letters_that_the_tokenizer_knows(tmp_path):
    record(tmp_path, 2)
    for number in range(2):
        (tmp_path / f"00{number}.txt").write_text("A, b – (C)!")
    made = small_wav2vec2(**TINY, layers=1, channels=8, letters="abc")
    data = prepared(tmp_path, made, eval_fraction=0.5)
    assert texts(data.train, made[1]) == ["a b c"]


def test_a_text_longer_than_the_decoder_writes_is_left_out(tmp_path):
    record(tmp_path, 4)
    (tmp_path / "000.txt").write_text("abc" * 10)
    data = prepared(tmp_path, small_whisper(**TINY, seconds=1, mel_bins=8, longest_text=16))
    assert "1 with a text of more than 16 tokens" in data.facts["left_out"]


@pytest.mark.parametrize("form", ["bytes", "paths", "arrays"])
def test_tables_of_recordings(form, tmp_path):
    record(tmp_path / "sounds", 4)
    files = sorted((tmp_path / "sounds").glob("*.wav"))
    rows = {
        "bytes": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
        "paths": [f"sounds/{file.name}" for file in files],
        "arrays": [{"array": spoken("ab", 8_000).tolist(), "sampling_rate": 8_000} for _ in files],
    }[form]
    table = Dataset.from_dict({"audio": rows, "sentence": ["ab", "bc", "ca", "cb"]})
    path = tmp_path / "table.parquet"
    table.to_parquet(path)
    data = prepared(path, eval_fraction=0.25)
    assert len(data.train) == 3 and len(data.train[0]["input_values"]) == pytest.approx(len(spoken("ab")), abs=8)


def test_a_column_of_recordings_as_datasets_stores_it(tmp_path):
    record(tmp_path / "sounds", 3)
    files = sorted((tmp_path / "sounds").glob("*.wav"))
    rows = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    table = Dataset.from_dict({"speech": rows, "text": ["ab", "bc", "ca"]})
    features = Features({"speech": Audio(sampling_rate=16_000), "text": Value("string")})
    kept = table.data.table.replace_schema_metadata(features.arrow_schema.metadata)
    parquet.write_table(kept, tmp_path / "table.parquet")
    assert isinstance(open_data(section(tmp_path / "table.parquet"), 0).train.features["audio"], Audio)
    data = prepared(tmp_path / "table.parquet", eval_fraction=0.3)
    assert len(data.train[0]["input_values"]) == len(spoken("ab"))


def test_beyond_the_room_recordings_are_decoded_when_they_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("hfprune.data.speech.KEPT_BYTES", 0)
    record(tmp_path, 4)
    data = prepared(tmp_path, eval_fraction=0.25)
    assert all(clip.samples is None for clip in data.train.clips)
    assert np.isfinite(data.train[0]["input_values"]).all()
    data.train.clips[0].base.joinpath(data.train.clips[0].value["path"]).unlink()
    with pytest.raises(DataError, match="can't be decoded"):
        data.train[0]


def test_lengths_are_known_without_decoding(tmp_path):
    write_audio(tmp_path / "one.wav", np.zeros(12_000, np.float32))
    assert seconds_of(tmp_path / "one.wav") == seconds_of((tmp_path / "one.wav").read_bytes()) == 0.75
    with pytest.raises(DataError, match="can't be decoded"):
        seconds_of(b"nothing", "it")


def test_what_is_no_recogniser_or_no_data_is_refused(tmp_path):
    record(tmp_path, 3)
    model, processor = small_wav2vec2(**TINY, layers=1, channels=8)
    with pytest.raises(ModelError, match="Wav2Vec2Model is no recogniser"):
        prepared(tmp_path, (model.wav2vec2, processor))
    with pytest.raises(ModelError, match="needs a processor"):
        prepared(tmp_path, (model, None))
    model.config.pad_token_id = 5
    with pytest.raises(ModelError, match="the tokenizer's blank is token 0, the model's 5"):
        prepared(tmp_path, (model, processor))
    with pytest.raises(DataError, match="is one recording"):
        open_data(section(tmp_path / "000.wav"), 0)
    Dataset.from_dict({"n": [1], "text": ["a"]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match=r"data\.audio_column: no column .* looks like recordings"):
        open_data(section(tmp_path / "t.parquet"), 0)


def test_a_multilingual_model_is_asked_for_its_language(tmp_path):
    record(tmp_path, 3)
    model, processor = small_whisper(**TINY, seconds=1, mel_bins=8, longest_text=16)
    model.generation_config.is_multilingual = True
    with pytest.raises(ConfigError, match=r"data\.language: missing"):
        prepared(tmp_path, (model, processor))
    with pytest.raises(ConfigError, match=r"data\.language: Unsupported language"):
        prepared(tmp_path, (model, processor), language="xxx")
