"""n-best lists: their file, the simulated channel, and their rescoring by language models."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hfprune.errors import DataError, ModelError
from hfprune.scratch import byte_tokenizer
from hfprune.speech.channel import Channel, distance, sounds
from hfprune.speech.measures import measure_texts
from hfprune.speech.nbest import Hypothesis, NBest, nbest_lines, read_nbest, usable
from hfprune.speech.rescoring import LanguageModel, Lists, choose, rescore

TEXTS = ["the cat sat on the mat", "a dog ran to the cat", "the dog sat", "a cat ran on a mat"] * 4


WORDS = "zebra yolk quick fjord glyph vexing bumps waltz"


def nbest(reference, *said, language=None):
    return NBest(reference, tuple(Hypothesis(text, score) for text, score in said), language)


@pytest.fixture(scope="module")
def tiny():
    """A Llama of two small blocks that learned the four texts, and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(TEXTS, 280)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=48)  # fmt: skip
    model, end = LlamaForCausalLM(config), tokenizer.eos_token_id
    batch = tokenizer(TEXTS[:4], padding=True, padding_side="right", return_tensors="pt")
    ids = torch.cat([torch.full((4, 1), end), batch["input_ids"], torch.full((4, 1), end)], dim=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


# ---- the file ---------------------------------------------------------------------------------------------------


def test_lists_written_are_the_lists_read(tmp_path):
    lists = [nbest("Ähre one", ("Ehre one", -1.5), ("", -9), language="de"), nbest("two", ("two", 0.0))]
    (tmp_path / "a.jsonl").write_text(nbest_lines(lists) + "\n", encoding="utf-8")
    assert read_nbest(tmp_path / "a.jsonl") == lists


GOOD = {"reference": "a", "hypotheses": [{"text": "a", "score": 1}]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: not of the form"),
        (json.dumps({"hypotheses": []}), "line 2: not of the form"),
        (json.dumps(GOOD | {"hypotheses": []}), "line 2: no hypotheses"),
        (json.dumps(GOOD | {"language": 3}), "line 2: language must be a code"),
        (json.dumps(GOOD | {"hypotheses": [{"text": "a"}]}), "line 2: a hypothesis must hold"),
        (json.dumps(GOOD | {"hypotheses": [{"text": "a", "score": math.nan}]}), "line 2: a hypothesis must hold"),
        (json.dumps(GOOD | {"hypotheses": ["a"]}), "line 2: a hypothesis must hold"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        read_nbest(tmp_path / "a.jsonl")


def test_a_file_without_lists(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no n-best list"):
        read_nbest(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="can't be read"):
        read_nbest(tmp_path / "none.jsonl")


def test_references_without_a_word_are_left_out_and_counted():
    lists = [nbest("um.", ("a", 0.0), language="en"), nbest("yes", ("yes", 0.0), language="en")]
    kept, line = usable(lists)
    assert kept == lists[1:] and line == "1 of 2 utterances are left out: no word in their reference"
    assert usable(kept) == (kept, "")
    with pytest.raises(DataError, match="no reference holds a word"):
        usable(lists[:1])


# ---- the simulated channel ----------------------------------------------------------------------------------------


def test_what_sounds_alike_is_near():
    assert sounds("knight") == sounds("nite") and distance(sounds("phone"), sounds("fone")) == 0
    near, far, shorter, nothing = (distance("bat", other) for other in ("pat", "mat", "bt", ""))
    assert (near, far, shorter, nothing) == pytest.approx((0.4, 1.0, 0.5, 2.5))


def test_the_channel_without_noise_hears_everything_and_with_noise_less():
    texts = ["the cat sat on the mat", "a bat sat on a mad cad"]
    clear = Channel(texts * 3, noise=0.0, hypotheses=5)(texts, "en")
    assert [one.hypotheses[0] for one in clear] == [Hypothesis(text, 0.0) for text in texts]
    assert all(len(one.hypotheses) == 5 and one.language == "en" for one in clear)
    noisy = Channel(texts * 3, noise=0.5, hypotheses=5, seed=3)
    found = noisy(texts * 20)
    said = [one.hypotheses[0].text for one in found]
    assert measure_texts(texts * 20, said).wer > 0.1
    for one in found:
        scores = [each.score for each in one.hypotheses]
        assert scores == sorted(scores, reverse=True) and len({each.text for each in one.hypotheses}) == 5
    again = Channel(texts * 3, noise=0.5, hypotheses=5, seed=3)(texts * 20)
    assert again == found != Channel(texts * 3, noise=0.5, hypotheses=5, seed=4)(texts * 20)


# ---- rescoring ----------------------------------------------------------------------------------------------------


def test_log_probabilities_do_not_depend_on_padding(tiny):
    model, tokenizer = tiny
    texts = ["the cat", "", "a dog ran to the cat"]
    together, tokens = LanguageModel(model, tokenizer).log_probabilities(texts)
    alone = [LanguageModel(model, tokenizer, batch_size=1).log_probabilities([text])[0][0] for text in texts]
    assert np.allclose(together, alone, atol=1e-4)
    end = tokenizer.eos_token_id
    for text, value, count in zip(texts, together, tokens, strict=True):
        ids = torch.tensor([[end, *tokenizer(text, add_special_tokens=False)["input_ids"], end]])
        logs = torch.log_softmax(model(input_ids=ids).logits[0, :-1], dim=-1)
        assert value == pytest.approx(logs.gather(1, ids[0, 1:, None]).sum().item(), abs=1e-4)
        assert count == ids.shape[1] - 1
    without_end, _ = LanguageModel(model, tokenizer).log_probabilities(texts, end=False)
    assert (without_end > together).all() and without_end[1] == 0


def test_word_errors_are_jiwer_s_and_normalised():
    lists = Lists([nbest("The Cat sat", ("the cat", -1.0), ("the cat sat down", -2.0), language="en"),
                   nbest("a dog", ("dog a", 0.0), language="en")])  # fmt: skip
    assert lists.errors[0].tolist() == [1, 1] and lists.errors[1, 0] == 2 and lists.words.tolist() == [3, 2]
    assert lists.first_best == measure_texts(["the cat sat", "a dog"], ["the cat", "dog a"]).wer == 3 / 5
    assert lists.oracle == 3 / 5


def lists_for(seed, count):
    """The right text a little below a wrong one, by scores that say nothing."""
    random = np.random.default_rng(seed)
    made = []
    for index in range(count):
        right = TEXTS[index % 4]
        wrong = " ".join(right.split()[::-1])
        high, low = random.uniform(0, 0.3), -random.uniform(0, 0.3)
        made.append(nbest(right, (wrong, high), (right, low), ("mat " + right, low - 0.1)))
    return Lists(made)


def test_a_language_model_that_knows_better_is_believed(tiny):
    model = LanguageModel(*tiny)
    test, development = lists_for(0, 12), lists_for(1, 8)
    told = []
    found = rescore(model, test, development, lambda done, total: told.append((done, total)))
    assert found.first_best_wer > 0.5 and found.oracle_wer == 0.0 and found.wer < 0.1
    assert len(found.choices) == 1 and found.choices[0][0] > 0 and told[-1] == (12, 12)
    assert measure_texts([one.reference for one in test.lists], found.texts).wer == found.wer
    assert found.milliseconds > 0
    assert found.perplexity < 10 and found.word_perplexity > found.perplexity
    assert "texts" not in found.to_dict() and json.dumps(found.to_dict())


def test_weight_and_penalty_are_never_chosen_on_what_is_reported(tiny):
    model = LanguageModel(*tiny)
    test = lists_for(0, 8)
    # On this development set the recogniser is always right, so that the language model must not be believed.
    right = [
        nbest(" ".join(text.split()[::-1]), (" ".join(text.split()[::-1]), 0.0), (text, -0.01)) for text in TEXTS[:4]
    ]
    found = rescore(model, test, Lists(right))
    assert found.choices == [(0.0, 0.0)] and found.wer == found.first_best_wer
    halves = rescore(model, test)
    language, _ = model.score_all(test)
    rows = np.arange(8)
    assert halves.choices == [choose(test, language, rows[1::2]), choose(test, language, rows[::2])]
    with pytest.raises(DataError, match="a single utterance"):
        rescore(model, lists_for(0, 1))


def test_a_model_whose_weights_are_no_numbers_changes_nothing(tiny):
    test, development = lists_for(0, 4), lists_for(1, 4)
    language = np.full(test.scores.shape, np.nan)
    assert choose(development, language)[0] == 0.0
    assert test.totals(language, 0.0, 0.0).argmax(1).tolist() == [0] * 4


def test_what_a_language_model_can_not_take(tiny):
    model, tokenizer = tiny
    with pytest.raises(ModelError, match="a hypothesis or reference has .* tokens, and the language model takes 48"):
        LanguageModel(model, tokenizer).log_probabilities(["zebra " * 30])
    with pytest.raises(ModelError, match="the tokenizer is not the model's"):
        LanguageModel(model, byte_tokenizer([WORDS] * 9, 400)).log_probabilities([WORDS])
