"""Rescoring: n-best lists ranked anew by any causal language model, and what that does to the word error rate.

The total of a hypothesis is its recogniser's score + weight x its log-probability by the language model + penalty x its
number of words. Weight and penalty are chosen on a development set, for the fewest word errors, never on the lists that
are reported: where there is no development set, each half of the lists is ranked with what the other half chose.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn

from hfprune.errors import DataError, ModelError
from hfprune.speech.nbest import NBest
from hfprune.speech.needs import needed
from hfprune.speech.normalise import normaliser

WEIGHTS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5, 2.0)
PENALTIES = (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""What is tried on the development set; of equal choices the one nearest to nothing wins."""

Tell = Callable[[int, int], None]
"""Told how many utterances of how many are scored."""


class Lists:
    """n-best lists with the word errors of every hypothesis counted, once for all models.

    Args:
        lists: each with a reference that holds a word (`nbest.usable`). Both sides are normalised before words are
            counted; the language model reads the hypotheses as they are.
    """

    def __init__(self, lists: Sequence[NBest]):
        self.lists = list(lists)
        jiwer = needed("jiwer")
        pairs = [(one, text.text) for one in self.lists for text in one.hypotheses]
        references = [normaliser(one.language)(one.reference) for one, _ in pairs]
        hypotheses = [normaliser(one.language)(text) for one, text in pairs]
        if not all(references):
            raise DataError("a reference holds no word")
        found = jiwer.process_words(references, hypotheses)
        wrong = [sum(max(part.ref_end_idx - part.ref_start_idx, part.hyp_end_idx - part.hyp_start_idx)
                     for part in parts if part.type != "equal") for parts in found.alignments]  # fmt: skip
        longest = max(len(one.hypotheses) for one in self.lists)
        shape = (len(self.lists), longest)
        self.errors = np.zeros(shape, np.int64)
        self.scores = np.full(shape, -np.inf)
        self.lengths = np.zeros(shape)
        at = 0
        for row, one in enumerate(self.lists):
            count = len(one.hypotheses)
            self.errors[row, :count] = wrong[at : at + count]
            self.scores[row, :count] = [each.score for each in one.hypotheses]
            self.lengths[row, :count] = [len(each.text.split()) for each in one.hypotheses]
            self.errors[row, count:] = np.iinfo(np.int64).max
            at += count
        self.words = np.array([len(normaliser(one.language)(one.reference).split()) for one in self.lists])

    def wer(self, chosen: np.ndarray, rows: np.ndarray | None = None) -> float:
        """The word error rate of one hypothesis an utterance: indices (utterances,), of some rows or all."""
        rows = np.arange(len(self.lists)) if rows is None else rows
        return float(self.errors[rows, chosen].sum() / self.words[rows].sum())

    @cached_property
    def first_best(self) -> float:
        """The word error rate of what the recogniser holds likeliest."""
        return self.wer(self.scores.argmax(1))

    @cached_property
    def oracle(self) -> float:
        """The least word error rate that any choice from the lists has."""
        return self.wer(self.errors.argmin(1))

    def totals(self, language: np.ndarray, weight: float, penalty: float) -> np.ndarray:
        """Scores (utterances, hypotheses) with the language model's log-probabilities of the same shape."""
        return self.scores + (weight * language if weight else 0.0) + penalty * self.lengths


@dataclass(frozen=True)
class Rescoring:
    """What a language model made of n-best lists.

    Attributes:
        wer: the word error rate after rescoring.
        first_best_wer, oracle_wer: of the recogniser alone, and the least that the lists allow.
        choices: weight and penalty; two pairs where each half of the lists was ranked with the other's.
        perplexity: of the references, a token, each sentence's end among them.
        word_perplexity: the same a word, which models with different tokenizers can be compared by.
        milliseconds: of an utterance, all its hypotheses in batches; the median.
        utterances, hypotheses: how many, in all.
    """

    wer: float
    first_best_wer: float
    oracle_wer: float
    choices: list[tuple[float, float]]
    perplexity: float
    word_perplexity: float
    milliseconds: float
    utterances: int
    hypotheses: int
    texts: list[str] = field(default_factory=list, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the texts that were chosen."""
        values = asdict(self)
        del values["texts"]
        return values | {"choices": [list(choice) for choice in self.choices]}


class LanguageModel:
    """Scores texts by a causal language model.

    Args:
        model: any with a language-modelling head, dense or pruned; left in evaluation mode.
        tokenizer: its tokenizer. A text begins after the beginning-of-text token, or the end-of-text token where there
            is none, and its end is scored too where the tokenizer has such a token.
        batch_size: texts at once, padded right to the longest.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int = 32):
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if begin is None:
            raise ModelError("the tokenizer has neither a beginning-of-text nor an end-of-text token")
        self.begin = begin
        self.end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.device = next(model.parameters()).device

    def log_probabilities(self, texts: Sequence[str], end: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """In nats, and the numbers of tokens that were scored: (texts,) each.

        Args:
            texts: any strings.
            end: score that they end, too.

        Raises:
            ModelError: a text is longer than the model takes, or the tokenizer is not the model's.
        """
        sequences = self._sequences(texts, end)
        sums = np.zeros(len(texts))
        for start in range(0, len(sequences), self.batch_size):
            sums[start : start + self.batch_size] = self._batch(sequences[start : start + self.batch_size])
        return sums, np.array([len(sequence) - 1 for sequence in sequences])

    def check(self, lists: Sequence[NBest]) -> None:
        """Reads lists without scoring them.

        Raises:
            ModelError: a text is longer than the model takes, or the tokenizer is not the model's.
        """
        self._sequences([text for one in lists for text in (one.reference, *(said.text for said in one.hypotheses))])

    def _sequences(self, texts: Sequence[str], end: bool = True) -> list[list[int]]:
        """The tokens of each text, its beginning and end among them."""
        found = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        sequences = [[self.begin, *ids, *(self.end if end else [])] for ids in found]
        self._refuse_what_does_not_fit(sequences)
        return sequences

    def _refuse_what_does_not_fit(self, sequences: list[list[int]]) -> None:
        config = getattr(self.model, "config", None)
        limit = getattr(config, "max_position_embeddings", None)
        longest = max(map(len, sequences), default=0)
        if limit is not None and longest > limit:
            raise ModelError(f"a hypothesis or reference has {longest} tokens, and the language model takes {limit}")
        known = self.model.get_input_embeddings().weight.shape[0]
        if max((max(sequence) for sequence in sequences), default=0) >= known:
            raise ModelError(f"the tokenizer is not the model's: it has tokens beyond the model's {known}")

    @torch.inference_mode()
    def _batch(self, sequences: list[list[int]]) -> np.ndarray:
        longest = max(map(len, sequences))
        ids = torch.full((len(sequences), longest), self.begin)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        losses = nn.functional.cross_entropy(
            logits.float().transpose(1, 2), targets, ignore_index=-100, reduction="none"
        )
        return -losses.sum(1).double().cpu().numpy()

    def score(self, one: NBest) -> tuple[np.ndarray, float]:
        """The log-probabilities of an utterance's hypotheses, and the milliseconds that took."""
        self._wait()
        began = time.perf_counter()
        found, _ = self.log_probabilities([each.text for each in one.hypotheses])
        self._wait()
        return found, 1000 * (time.perf_counter() - began)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def score_all(self, lists: Lists, tell: Tell | None = None) -> tuple[np.ndarray, float]:
        """Log-probabilities (utterances, hypotheses), minus infinity where a list is shorter; median milliseconds."""
        found = np.full(lists.scores.shape, -np.inf)
        times = []
        for row, one in enumerate(lists.lists):
            values, spent = self.score(one)
            found[row, : len(values)] = values
            times.append(spent)
            if tell is not None:
                tell(row + 1, len(lists.lists))
        return found, float(np.median(times))


def choose(lists: Lists, language: np.ndarray, rows: np.ndarray | None = None) -> tuple[float, float]:
    """The weight and the penalty with the fewest word errors on lists, of some rows or all."""
    rows = np.arange(len(lists.lists)) if rows is None else rows

    def key(choice: tuple[float, float]) -> tuple[float, float, float]:
        best = _finite(lists.totals(language, *choice))[rows].argmax(1)
        return lists.wer(best, rows), choice[0], abs(choice[1])

    weights = (0.0,) if np.isnan(language).any() else WEIGHTS
    return min(product(weights, PENALTIES), key=key)


def rescore(model: LanguageModel, test: Lists, development: Lists | None = None, tell: Tell | None = None) -> Rescoring:
    """Ranks n-best lists anew, and measures the result.

    Example:
        >>> lists = Lists(read_nbest("nbest.jsonl"))
        >>> rescore(LanguageModel(model, tokenizer), lists, Lists(read_nbest("development.jsonl"))).wer

    Args:
        model: the language model.
        test: the lists that are reported.
        development: other lists, on which weight and penalty are chosen; by default each half's for the other.
        tell: told of every utterance of `test`.

    Raises:
        DataError: a single utterance, and no development set.
        ModelError: a hypothesis that the model can't take.
    """
    language, spent = model.score_all(test, tell)
    rows = np.arange(len(test.lists))
    if development is not None:
        seen, _ = model.score_all(development)
        choices = [choose(development, seen)]
        parts = [(rows, choices[0])]
    else:
        halves = rows[::2], rows[1::2]
        if not len(halves[1]):
            raise DataError("a single utterance can't choose weight and penalty for itself; give a development set")
        choices = [choose(test, language, half) for half in reversed(halves)]
        parts = list(zip(halves, choices, strict=True))
    picked = np.zeros(len(rows), np.int64)
    for some, choice in parts:
        picked[some] = _finite(test.totals(language, *choice))[some].argmax(1)
    said, tokens = model.log_probabilities([one.reference for one in test.lists])
    words = sum(len(one.reference.split()) for one in test.lists)
    return Rescoring(
        wer=test.wer(picked),
        first_best_wer=test.first_best,
        oracle_wer=test.oracle,
        choices=choices,
        perplexity=_exp(-said.sum() / tokens.sum()),
        word_perplexity=_exp(-said.sum() / words),
        milliseconds=spent,
        utterances=len(test.lists),
        hypotheses=sum(len(one.hypotheses) for one in test.lists),
        texts=[one.hypotheses[index].text for one, index in zip(test.lists, picked, strict=True)],
    )


def _finite(totals: np.ndarray) -> np.ndarray:
    """Where the language model gives no number the hypothesis comes last."""
    return np.where(np.isnan(totals), -np.inf, totals)


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf
