"""What is measured of transcripts, against jiwer and by hand, and how texts are written before."""

import jiwer
import pytest

from hfprune.errors import DataError
from hfprune.speech.measures import measure_texts
from hfprune.speech.normalise import normaliser


def test_a_worked_example():
    """Eleven words, of which three are left: 8 / 11; with the arguments the other way round it would be 8 / 3."""
    reference = "the quick brown fox jumps over the lazy dog every day"
    found = measure_texts([reference], ["quick fox dog"])
    assert (found.hits, found.substitutions, found.deletions, found.insertions, found.words) == (3, 0, 8, 0, 11)
    assert found.wer == pytest.approx(8 / 11) and round(found.wer, 3) == 0.727
    assert found.mer == pytest.approx(8 / 11)
    assert found.wip == pytest.approx(3 / 11 * 3 / 3) and found.wil == pytest.approx(1 - 3 / 11)


def test_equals_jiwer():
    references = ["a b c d", "one two three", "so it is"]
    hypotheses = ["a x c", "one two two three four", ""]
    found = measure_texts(references, hypotheses)
    assert found.wer == jiwer.wer(references, hypotheses) and found.cer == jiwer.cer(references, hypotheses)
    assert found.mer == jiwer.mer(references, hypotheses)
    assert found.wil == jiwer.wil(references, hypotheses) and found.wip == jiwer.wip(references, hypotheses)


@pytest.mark.parametrize(
    ("references", "hypotheses", "line"),
    [(["a", " "], ["a", "b"], "reference is empty .number 1"), ([], [], "0 references"), (["a"], [], "1 references")],
)
def test_what_can_not_be_compared(references, hypotheses, line):
    with pytest.raises(DataError, match=line):
        measure_texts(references, hypotheses)


@pytest.mark.parametrize(
    ("language", "text", "normal"),
    [
        ("en", "Mr. Smith's colour, um, cost $20 million!", "mister smith is color cost $20000000"),
        ("en-GB", "I won't [laughs]", "i will not"),
        ("de", "Der Straßenname (leise), Ähre.", "der straßenname ähre"),
        ("ja", "日本 語", "日 本 語"),
        (None, "Hello,  WORLD", "hello world"),
    ],
)
def test_texts_are_written_alike(language, text, normal):
    assert normaliser(language)(text) == normal
