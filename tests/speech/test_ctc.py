"""CTC's beam search against all alignments, written out, alone and with a language model."""

import itertools
import math

import numpy as np
import pytest

from hfprune.errors import DataError
from hfprune.speech.ctc import WordFusion, prefix_beam_search


def collapsed(alignment, blank):
    return tuple(unit for unit, _ in itertools.groupby(alignment) if unit != blank)


def every_alignment(frames, blank):
    """The probability of every unit sequence: the sum over all alignments that collapse to it."""
    found = {}
    for alignment in itertools.product(range(frames.shape[1]), repeat=len(frames)):
        ids = collapsed(alignment, blank)
        found[ids] = found.get(ids, 0.0) + math.exp(sum(frames[t, unit] for t, unit in enumerate(alignment)))
    return found


def random_frames(count, units, seed):
    logits = np.random.default_rng(seed).normal(size=(count, units)) * 2
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


@pytest.mark.parametrize("blank", [0, 2])
@pytest.mark.parametrize(("count", "units"), [(1, 3), (4, 3), (6, 3), (4, 4)])
def test_equals_the_sum_over_all_alignments(count, units, blank):
    frames = random_frames(count, units, seed=count)
    beams = prefix_beam_search(frames, blank=blank, width=10_000)
    wanted = every_alignment(frames, blank)
    assert {beam.ids for beam in beams} == set(wanted)
    for beam in beams:
        assert beam.acoustic == beam.total == pytest.approx(math.log(wanted[beam.ids]), abs=1e-9)
    assert [beam.total for beam in beams] == sorted((beam.total for beam in beams), reverse=True)


def test_a_narrow_beam_finds_the_best_of_sharp_frames():
    frames = random_frames(7, 4, seed=3) * 3
    frames -= np.logaddexp.reduce(frames, axis=1, keepdims=True)
    best = max((found := every_alignment(frames, 0)), key=found.get)
    beams = prefix_beam_search(frames, width=4, units=2)
    assert beams[0].ids == best and len(beams) == 4
    assert beams[0].acoustic <= math.log(found[best]) + 1e-9


def test_a_repeated_unit_needs_a_blank_between():
    sure = np.log(np.array([[0.01, 0.98, 0.01]] * 2 + [[0.98, 0.01, 0.01]] + [[0.01, 0.98, 0.01]]))
    assert prefix_beam_search(sure)[0].ids == (1, 1)
    assert prefix_beam_search(sure[[0, 1, 3]])[0].ids == (1,)


class Counting:
    """In place of a language model: likes the word `b`, and says how often it was asked."""

    def __init__(self):
        self.asked = []

    def log_probabilities(self, texts, end=True):
        self.asked += [(text, end) for text in texts]
        values = [sum(-0.1 if word == "b" else -2.0 for word in text.split()) - 0.5 * end for text in texts]
        return np.array(values), np.ones(len(texts))


def test_fusion_adds_the_score_of_whole_words():
    units = ["", " ", "a", "b"]
    model = Counting()
    fusion = WordFusion(model, units, weight=0.7, penalty=0.3)
    frames = random_frames(4, 4, seed=1)
    beams = prefix_beam_search(frames, width=10_000, bonus=fusion)
    wanted = every_alignment(frames, 0)
    assert {beam.ids for beam in beams} == set(wanted)
    for beam in beams:
        words = "".join(units[unit] for unit in beam.ids).split()
        language = sum(-0.1 if word == "b" else -2.0 for word in words) - 0.5
        assert beam.acoustic == pytest.approx(math.log(wanted[beam.ids]), abs=1e-9)
        assert beam.total == pytest.approx(beam.acoustic + 0.7 * language + 0.3 * len(words), abs=1e-9)
    assert beams[0].total == max(beam.total for beam in beams)
    assert len(model.asked) == len(set(model.asked))


def test_fusion_leaves_a_word_that_may_grow():
    fusion = WordFusion(Counting(), ["", " ", "a", "b"], 1.0)
    assert fusion.words((2, 1, 3, 3), whole=False) == "a" and fusion.words((2, 1, 3, 3)) == "a bb"
    assert fusion.words((2, 3), whole=False) == "" and fusion([(2, 3)], False) == [0.0]
    assert fusion([(3, 1)], False) == [-0.1] and fusion([(3, 1)], True) == [-0.6]


def test_a_language_model_turns_the_choice():
    close = np.log(np.array([[0.02, 0.02, 0.5, 0.46], [0.02, 0.94, 0.02, 0.02]]))
    assert prefix_beam_search(close)[0].ids == (2, 1)
    assert prefix_beam_search(close, bonus=WordFusion(Counting(), ["", " ", "a", "b"], 1.0))[0].ids == (3, 1)


@pytest.mark.parametrize(("frames", "blank"), [(np.zeros(3), 0), (np.zeros((2, 3)), 3), (np.full((2, 3), np.nan), 0)])
def test_what_is_no_ctc_output(frames, blank):
    with pytest.raises(DataError, match="log-probabilities"):
        prefix_beam_search(frames, blank=blank)
