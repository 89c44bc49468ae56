"""`hfprune nbest`: lists of recordings from recognisers of both kinds, and what can't be listed."""

import json

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hfprune.cli import app
from hfprune.scratch import byte_tokenizer
from hfprune.scratch_speech import small_wav2vec2, small_whisper
from hfprune.speech.audio import write_audio
from hfprune.speech.nbest import read_nbest
from tests.speech.sounds import record, spoken


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "180"})


def save(folder, model, processor):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Recordings of words, a tiny recogniser of each kind with random weights, and a tiny language model."""
    folder = tmp_path_factory.mktemp("nbest")
    record(folder / "recordings", 4)
    torch.manual_seed(0)
    save(folder / "ctc", *small_wav2vec2(letters="abc", hidden_size=16, intermediate_size=16, layers=1, heads=2))
    save(folder / "whisper", *small_whisper(hidden_size=16, intermediate_size=16, encoder_layers=1, decoder_layers=1,
                                            heads=2, mel_bins=8, seconds=1, longest_text=12))  # fmt: skip
    tokenizer = byte_tokenizer(["a b c"], 258)
    end = tokenizer.eos_token_id
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=256, bos_token_id=end,
                         eos_token_id=end)  # fmt: skip
    save(folder / "lm", LlamaForCausalLM(config), tokenizer)
    return folder


@pytest.mark.parametrize("kind", ["ctc", "whisper"])
def test_lists_of_recordings_can_be_rescored(place, tmp_path, kind):
    output = tmp_path / "nbest.jsonl"
    done = call("nbest", place / "recordings", "--model", place / kind, "--count", 4, "--output", output)
    assert done.exit_code == 0, done.output
    assert f"{output}: 4 recordings, " in done.stdout and "the best that its lists allow" in done.stdout
    lists = read_nbest(output)
    transcripts = [path.read_text() for path in sorted((place / "recordings").glob("*.txt"))]
    assert [one.reference for one in lists] == transcripts and {one.language for one in lists} == {None}
    for one in lists:
        scores = [each.score for each in one.hypotheses]
        assert 1 <= len(scores) <= 4 and scores == sorted(scores, reverse=True)
    assert call("rescore", output, "--models", place / "lm").exit_code == 0
    again = call("nbest", place / "recordings", "--model", place / kind, "--output", output)
    assert again.exit_code == 2 and "exists; name another file" in again.stderr and read_nbest(output) == lists


def test_a_recording_without_a_list_has_a_reason_and_the_others_go_on(place, tmp_path):
    folder = record(tmp_path / "recordings", 2)
    (folder / "broken.wav").write_bytes(b"no sound")
    write_audio(folder / "long.wav", np.zeros(40_000, np.float32))
    write_audio(folder / "short.wav", np.zeros(100, np.float32))
    for name in ("broken", "long", "short"):
        (folder / f"{name}.txt").write_text("a")
    write_audio(folder / "silent.wav", spoken("a"))
    (folder / "silent.txt").write_text("…")
    write_audio(folder / "untold.wav", spoken("a"))
    options = ("--model", place / "ctc", "--max-seconds", 2, "--language", "de")
    done = call("nbest", folder, *options, "--output", tmp_path / "a.jsonl")
    assert done.exit_code == 0 and "2 recordings, " in done.stdout and "5 of 7 recordings left" in done.stdout
    assert [one.language for one in read_nbest(tmp_path / "a.jsonl")] == ["de"] * 2
    assert "broken.wav: can't be decoded" in done.stderr and "long.wav: 2.5 s of sound, more than 2" in done.stderr
    assert "short.wav: 0.006 s of sound, too little for a single frame" in done.stderr
    assert "silent.wav: no word in its transcript" in done.stderr and "untold.wav: no transcript" in done.stderr
    few = call("nbest", folder, *options, "--limit", 1, "--output", tmp_path / "b.jsonl")
    assert few.exit_code == 0 and "1 recording, " in few.stdout
    for path in folder.glob("0*"):
        path.unlink()
    done = call("nbest", folder, *options, "--output", tmp_path / "c.jsonl")
    assert done.exit_code == 2 and "not one of 5 recordings gave a list; broken.wav: can't be decoded" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "recordings"]


def test_the_language_of_a_recording_goes_before_that_of_the_command(place, tmp_path):
    folder = record(tmp_path / "recordings", 2)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "000.wav", "text": "ab c", "language": "fr"}))
    output = tmp_path / "nbest.jsonl"
    done = call("nbest", folder, "--model", place / "ctc", "--count", 2, "--language", "de", "--output", output)
    assert done.exit_code == 0, done.output
    first, second = read_nbest(output)
    assert (first.reference, first.language, second.language) == ("ab c", "fr", "de")


def test_shallow_fusion_changes_the_scores(place, tmp_path):
    def lists(name, *options):
        done = call("nbest", place / "recordings", "--model", place / "ctc", "--limit", 1, "--count", 3, *options,
                    "--beams", 4, "--output", tmp_path / name)  # fmt: skip
        assert done.exit_code == 0, done.output
        return read_nbest(tmp_path / name)[0].hypotheses

    alone, with_none = lists("alone"), lists("none", "--fuse", place / "lm", "--weight", 0)
    assert alone == with_none and alone[0].score > lists("much", "--fuse", place / "lm", "--weight", 2)[0].score


def test_what_makes_no_lists_is_one_line(place, tmp_path):
    (tmp_path / "empty").mkdir()
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    BertModel(config).save_pretrained(tmp_path / "bert")
    sounds, ctc, output = place / "recordings", place / "ctc", tmp_path / "nbest.jsonl"
    for options, message in [
        ((sounds, "--model", tmp_path / "bert"), "is not a speech recogniser: it holds BertModel"),
        ((sounds, "--model", "none"), "no such folder"),
        ((tmp_path / "nowhere", "--model", ctc), f"no folder '{tmp_path / 'nowhere'}'"),
        ((tmp_path / "empty", "--model", ctc), "holds no recording"),
        ((sounds, "--model", ctc, "--output", tmp_path / "no" / "a.jsonl"), f"no folder '{tmp_path / 'no'}'"),
        ((sounds, "--model", ctc, "--count", 8, "--beams", 4), "--beams: 4 can't give 8 hypotheses"),
        ((sounds, "--model", ctc, "--weight", 1), "--weight: is that of a language model"),
        ((sounds, "--model", ctc, "--fuse", ctc), "which is no causal language model"),
        ((sounds, "--model", place / "whisper", "--fuse", place / "lm"), "shallow fusion is for CTC"),
    ]:
        done = call("nbest", "--output", output, *options)
        assert done.exit_code == 2 and message in done.stderr, (message, done.output)
        assert done.stderr.count("\n") == 1 and not output.exists()
