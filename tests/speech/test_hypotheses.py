"""n-best lists of tiny recognisers with random weights, of both kinds."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GenerationMixin,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from hfprune.errors import DataError, ModelError
from hfprune.scratch import byte_tokenizer
from hfprune.speech.hypotheses import Fusion, ctc_units, heard, recogniser, whisper_prompt

SAMPLES = np.random.default_rng(0).normal(size=4_000).astype(np.float32) * 0.1
LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", "a", "b", "c"]


@pytest.fixture(scope="module")
def ctc(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "vocab.json").write_text(json.dumps({unit: i for i, unit in enumerate(LETTERS)}))
    torch.manual_seed(0)
    config = Wav2Vec2Config(vocab_size=len(LETTERS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                            intermediate_size=16, conv_dim=(8, 8), conv_stride=(20, 20), conv_kernel=(20, 20),
                            num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
                            pad_token_id=0)  # fmt: skip
    tokenizer = Wav2Vec2CTCTokenizer(folder / "vocab.json")
    return Wav2Vec2ForCTC(config).eval(), Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), tokenizer)


class Processor:
    """Feature extractor and tokenizer, as a processor has them."""

    def __init__(self, extractor, tokenizer):
        self.feature_extractor, self.tokenizer = extractor, tokenizer
        self.batch_decode = tokenizer.batch_decode

    def __call__(self, samples, **options):
        return self.feature_extractor(samples, **options)


@pytest.fixture(scope="module")
def whisper():
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(["a b c"], 258)
    end = tokenizer.eos_token_id
    config = WhisperConfig(vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, num_mel_bins=8,
                           encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
                           max_source_positions=50, max_target_positions=12, decoder_start_token_id=80,
                           bos_token_id=end, eos_token_id=end, pad_token_id=end)  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    nn.init.normal_(model.proj_out.weight, std=0.5)
    model.generation_config.max_length = 10
    model.generation_config.suppress_tokens = model.generation_config.begin_suppress_tokens = None
    return model, Processor(WhisperFeatureExtractor(feature_size=8, chunk_length=1), tokenizer)


def test_ctc_lists_are_sums_over_alignments(ctc):
    model, processor = ctc
    found = recogniser(model, processor, count=5)(SAMPLES)
    scores = [one.score for one in found]
    assert 1 < len(found) <= 5 and scores == sorted(scores, reverse=True) and max(scores) < 0
    assert len({one.text for one in found}) == len(found) and all(set(one.text) <= set("abc ") for one in found)
    assert ctc_units(processor.tokenizer, 8) == ["", "", "", "", " ", "a", "b", "c"]


def test_sound_is_brought_to_the_rate_that_the_recogniser_takes(ctc):
    model, processor = ctc
    slow = Processor(Wav2Vec2FeatureExtractor(sampling_rate=8_000), processor.tokenizer)
    assert (
        heard(model, slow, SAMPLES, 3) == heard(model, slow, np.copy(SAMPLES), 3) != heard(model, processor, SAMPLES, 3)
    )
    with pytest.raises(DataError, match="0.025 s of sound, too little for a single frame"):
        heard(model, slow, SAMPLES[:400], 3)


def test_capitals_alone_are_written_small(tmp_path):
    capitals = [unit.upper() if len(unit) == 1 else unit for unit in LETTERS]
    (tmp_path / "vocab.json").write_text(json.dumps({unit: i for i, unit in enumerate(capitals)}))
    assert ctc_units(Wav2Vec2CTCTokenizer(tmp_path / "vocab.json"), 8) == ["", "", "", "", " ", "a", "b", "c"]


def test_more_sound_than_fits_is_refused(whisper):
    with pytest.raises(DataError, match="2.0 s of sound, and the recogniser takes 1.0 s at once"):
        recogniser(*whisper)(np.zeros(32_000, np.float32))


def test_shallow_fusion_moves_ctc_lists(ctc):
    class Likes:
        def log_probabilities(self, texts, end=True):
            return np.array([20.0 * text.count("b") for text in texts]), None

    model, processor = ctc
    plain, fused = (heard(model, processor, SAMPLES, 5, 64, fusion) for fusion in (None, Fusion(Likes())))
    assert fused[0].text.count("b") > plain[0].text.count("b")


def test_written_lists_hold_whole_log_probabilities(whisper):
    model, processor = whisper
    found = recogniser(model, processor, count=4)(SAMPLES)
    scores = [one.score for one in found]
    assert 1 < len(found) <= 4 and scores == sorted(scores, reverse=True) and max(scores) < 0
    # Against one pass over each sequence of the same search: the log-probabilities of its tokens.
    features = processor(SAMPLES, sampling_rate=16_000, return_tensors="pt")
    prompt = whisper_prompt(model, features, None)
    ids = GenerationMixin.generate(model, **features, decoder_input_ids=prompt, num_beams=4, num_return_sequences=4,
                                   do_sample=False)  # fmt: skip
    whole = {}
    for row in ids:
        end = [i for i, token in enumerate(row.tolist()) if token == model.config.eos_token_id and i]
        row = row[: end[0] + 1] if end else row
        logs = torch.log_softmax(model(**features, decoder_input_ids=row[None, :-1]).logits[0], dim=-1)
        (text,) = processor.batch_decode(row[None], skip_special_tokens=True)
        value = logs[len(prompt[0]) - 1 :].gather(1, row[len(prompt[0]) :, None]).sum().item()
        whole[text.strip()] = max(value, whole.get(text.strip(), value))
    assert {one.text: one.score for one in found} == pytest.approx(whole, abs=1e-3)


def test_a_model_that_says_no_limit_writes_as_long_a_text_as_it_can(whisper, monkeypatch):
    model, processor = whisper
    monkeypatch.setattr(model.generation_config, "max_length", None)
    monkeypatch.setattr(model.config, "max_target_positions", 8)
    before = recogniser(model, processor, count=2)(SAMPLES)
    monkeypatch.setattr(model.generation_config, "max_length", 8)
    assert recogniser(model, processor, count=2)(SAMPLES) == before


def test_whisper_s_prompt_says_the_language(whisper):
    model, processor = whisper
    features = processor(SAMPLES, sampling_rate=16_000, return_tensors="pt")
    said = {"is_multilingual": True, "lang_to_id": {"<|en|>": 5, "<|de|>": 6}, "task_to_id": {"transcribe": 7},
            "no_timestamps_token_id": 8}  # fmt: skip
    try:
        for key, value in said.items():
            setattr(model.generation_config, key, value)
        assert whisper_prompt(model, features, "de-AT").tolist() == [[80, 6, 7, 8]]
        assert whisper_prompt(model, features, None)[0, 1] in (5, 6)
        with pytest.raises(ModelError, match="does not know the language 'xx'"):
            whisper_prompt(model, features, "xx")
    finally:
        for key in said:
            delattr(model.generation_config, key)


def test_what_is_no_recogniser():
    model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    with pytest.raises(ModelError, match="BertModel is no recogniser"):
        recogniser(model, None)
