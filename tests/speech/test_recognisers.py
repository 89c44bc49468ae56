"""Recognisers are pruned like other models: what is left loads again, answers alike and still writes."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCTC, AutoModelForSpeechSeq2Seq, HubertConfig, HubertForCTC, Wav2Vec2ForCTC

import hfprune
from hfprune import PruningConfig
from hfprune.errors import ConfigError
from hfprune.metrics import CharacterErrorRate, WordErrorRate, metrics_for, predicted_tokens
from hfprune.scratch_speech import small_wav2vec2, small_whisper
from hfprune.speech.recognisers import generated, kind_of, texts_of, without_padding
from tests.speech.sounds import spoken

TINY = {"hidden_size": 16, "intermediate_size": 24, "heads": 2}


def whisper():
    return small_whisper(**TINY, encoder_layers=2, decoder_layers=2, seconds=1, mel_bins=8, longest_text=12)


def wav2vec2(norm="layer", stable=False):
    model, processor = small_wav2vec2(**TINY, layers=2, channels=8, stable_layer_norm=stable)
    model.config.feat_extract_norm = norm
    return Wav2Vec2ForCTC(model.config), processor


def hubert(stable=False):
    model, processor = small_wav2vec2(**TINY, layers=2, channels=8, stable_layer_norm=stable)
    known = HubertConfig().to_dict()
    values = {key: value for key, value in model.config.to_dict().items() if key in known and key != "model_type"}
    return HubertForCTC(HubertConfig(**values)), processor


MODELS = {
    "whisper": whisper,
    "wav2vec2": wav2vec2,
    "wav2vec2, group norm": lambda: wav2vec2(norm="group"),
    "wav2vec2, stable": lambda: wav2vec2(stable=True),
    "hubert": hubert,
    "hubert, stable": lambda: hubert(stable=True),
}


def heard(model, seconds=0.5):
    torch.manual_seed(1)
    if kind_of(model) == "seq2seq":
        return {"input_features": torch.randn(2, 8, 100), "decoder_input_ids": torch.randint(0, 250, (2, 5))}
    values, mask = torch.randn(2, int(16_000 * seconds)), torch.ones(2, int(16_000 * seconds), dtype=torch.long)
    mask[1, len(values[1]) // 2 :] = 0
    return {"input_values": values * mask, "attention_mask": mask}


@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        *((name, ["head", "neuron"]) for name in ("whisper", "wav2vec2", "hubert, stable")),
        *((name, granularity) for name in MODELS for granularity in ("layer", "rank")),
        *((name, "weight") for name in ("whisper", "wav2vec2, group norm")),
    ],
    ids=str,
)
def test_a_smaller_recogniser_loads_again_and_answers_alike(name, granularity, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]()[0].eval()
    before = sum(int(torch.count_nonzero(p)) for p in model.parameters())
    criterion = "singular_value" if granularity == "rank" else "l1"
    hfprune.prune(model, PruningConfig(criterion=criterion, granularity=granularity, target=0.5))
    assert sum(int(torch.count_nonzero(p)) for p in model.parameters()) < 0.95 * before
    hfprune.save_pretrained(model, tmp_path)
    auto = AutoModelForSpeechSeq2Seq if kind_of(model) == "seq2seq" else AutoModelForCTC
    again = auto.from_pretrained(tmp_path)
    assert type(again) is type(model)
    # Of another length than what it was pruned on, and padded.
    inputs = heard(model, seconds=0.7)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)
    if kind_of(model) == "seq2seq":
        written = generated(model, inputs, max_length=8)
        assert (
            torch.equal(written, generated(again, inputs, max_length=8)) and written.shape[1] <= 8 + 2
        )  # of the prompt


def test_self_and_cross_attention_of_encoder_and_decoder_lose_heads():
    torch.manual_seed(0)
    names = {group.name for group in hfprune.inspect(whisper()[0].eval()).groups if group.kind == "head"}
    for part in ("encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.1.encoder_attn"):
        assert any(part in name for name in names), names


def test_processors_and_generation_load_again(tmp_path):
    for make in (whisper, wav2vec2):
        model, processor = make()
        hfprune.save_pretrained(model, tmp_path / make.__name__, processing_class=processor)
        loaded = hfprune.from_pretrained(tmp_path / make.__name__)
        again = type(processor).from_pretrained(tmp_path / make.__name__)
        assert again.tokenizer("ab").input_ids == processor.tokenizer("ab").input_ids
        sound = [again(spoken("ab"), sampling_rate=16_000)[model.main_input_name][0] for _ in range(2)]
        assert np.array_equal(sound[0], sound[1])
        if make is whisper:
            assert loaded.generation_config.no_timestamps_token_id == model.generation_config.no_timestamps_token_id


def test_tokens_become_texts():
    _, letters = small_wav2vec2(**TINY, layers=1, channels=8, letters="abc")
    a, b, gap = (letters.tokenizer.convert_tokens_to_ids(token) for token in ("a", "b", "|"))
    frames = [[a, a, 0, a, gap, gap, b, -100], [0, 0, 0, 0, 0, 0, 0, 0]]
    assert texts_of(letters, frames) == ["aa b", ""]
    assert texts_of(letters, [[a, a, gap, b, -100]], labels=True) == ["aa b"]
    _, bytewise = whisper()
    assert texts_of(bytewise, [[*bytewise.tokenizer("größer").input_ids, -100]]) == ["größer"]


def test_what_is_padding_is_read_as_nothing():
    torch.manual_seed(0)
    model, processor = wav2vec2()
    inputs = heard(model)
    logits = model.eval()(**inputs).logits
    kept = without_padding(model, logits, inputs)
    frames = int(model._get_feat_extract_output_lengths(inputs["attention_mask"][1].sum()))
    assert torch.equal(kept[0], logits[0]) and torch.equal(kept[1, :frames], logits[1, :frames])
    assert (kept[1, frames:].argmax(-1) == model.config.pad_token_id).all()
    assert without_padding(model, logits, {"input_values": inputs["input_values"]}) is logits


def test_what_other_processes_fill_up_stays_padding():
    logits = torch.full((1, 3, 4), -100.0)
    logits[0, 0] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    assert predicted_tokens(logits, None).tolist() == [[2, -100, -100]]
    assert predicted_tokens(torch.tensor([[3, 1]]), None).tolist() == [[3, 1]]


def test_errors_are_counted_after_whispers_rules():
    said = ["Mr. Smith doesn't like colour TVs!", "one"]
    assert WordErrorRate(language="en").compute(predictions=["mister smith does not like color tvs", "1"],
                                                references=said) == {"wer": 0.0}  # fmt: skip
    assert WordErrorRate().compute(predictions=["one"], references=["one two"]) == {"wer": 0.5}
    assert CharacterErrorRate(language="zh").compute(predictions=["你好"], references=["你们"]) == {"cer": 0.5}
    assert WordErrorRate(language="zh").compute(predictions=["你好"], references=["你们"]) == {"wer": 0.5}


def test_metrics_of_speech_are_small_when_they_are_good():
    found = metrics_for(["wer", "cer"], "speech-recognition", "en")
    assert (found.main, found.greater_is_better) == ("wer", False)
    with pytest.raises(ConfigError, match="'accuracy' is no metric for speech-recognition; known: "):
        metrics_for(["accuracy"], "speech-recognition")
