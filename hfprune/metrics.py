"""What is measured: metrics that need no network, and any other by its name from the Hub."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor
from transformers import EvalPrediction

from hfprune.config import shrinks
from hfprune.errors import ConfigError, NotReachable
from hfprune.hub.reach import fetch
from hfprune.registry import Registry, did_you_mean
from hfprune.speech.measures import Measures, measure_texts
from hfprune.speech.normalise import LETTERS, code_of, normaliser
from hfprune.speech.recognisers import texts_of

CLASSIFICATION = ("image-classification", "text-classification")
DEFAULTS = {
    "image-classification": "accuracy",
    "text-classification": "accuracy",
    "causal-lm": "perplexity",
    "speech-recognition": "wer",
}
metrics: Registry[type[evaluate.Metric]] = Registry("metric")


@dataclass
class Metrics:
    """What transformers' Trainer is given to measure with.

    Attributes:
        compute: Trainer's `compute_metrics`.
        preprocess_logits: Trainer's `preprocess_logits_for_metrics`; reduces each batch's logits to what is measured.
        main: the name of the main metric, the first one asked for.
        greater_is_better: whether the main metric is to grow.
    """

    compute: Callable[[EvalPrediction], dict[str, float]]
    preprocess_logits: Callable[[Any, Any], Tensor]
    main: str
    greater_is_better: bool

    def read_by(self, processing_class: Any) -> Metrics:
        """The same, of a model whose answers this tokenizer or processor reads; only transcripts are read."""
        if not isinstance(self.compute, _TranscriptMetrics):
            return self
        return replace(self, compute=_TranscriptMetrics(self.compute.loaded, processing_class))


class LocalMetric(evaluate.Metric):
    """A metric of this module: it loads no script, and keeps what it is given in memory."""

    tasks: tuple[str, ...] = CLASSIFICATION
    greater_is_better = True
    dtype = "int64"

    def __init__(self, **options: Any):
        super().__init__(keep_in_memory=True, **options)

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value(self.dtype)
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            features=datasets.Features({"predictions": value, "references": value}),
        )


@metrics.register("accuracy")
class Accuracy(LocalMetric):
    """The fraction of predictions that are right."""

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


@metrics.register("f1")
class MacroF1(LocalMetric):
    """The mean over the classes of the harmonic mean of precision and recall."""

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"f1": float(f1_score(references, predictions, average="macro", zero_division=0))}


@metrics.register("matthews_correlation")
class MatthewsCorrelation(LocalMetric):
    """Correlation of predictions and references, 0 for chance (Matthews 1975; Gorodkin 2004 for several classes)."""

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


@metrics.register("perplexity")
class Perplexity(LocalMetric):
    """exp(negative log-likelihood of all tokens / their number).

    `predictions` are sequences' summed negative log-likelihoods in nats, `references` their numbers of tokens.
    """

    tasks = ("causal-lm",)
    greater_is_better = False
    dtype = "float64"

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        mean = math.fsum(predictions) / math.fsum(references)
        # Beyond exp(709) a float has no room; a model that bad, or broken, is infinitely perplexed.
        return {"perplexity": math.exp(mean) if mean < 709 else (math.nan if math.isnan(mean) else math.inf)}


@metrics.register("token_accuracy")
class TokenAccuracy(LocalMetric):
    """The fraction of tokens that are predicted right.

    `predictions` are sequences' numbers of right tokens, `references` their numbers of tokens.
    """

    tasks = ("causal-lm",)
    dtype = "float64"

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        return {"token_accuracy": math.fsum(predictions) / math.fsum(references)}


class TranscriptMetric(LocalMetric):
    """A metric of transcripts: both sides are written alike by Whisper's rules for the language, then compared.

    `predictions` are transcripts, `references` what was said.
    """

    tasks = ("speech-recognition",)
    greater_is_better = False
    dtype = "string"

    def __init__(self, language: str | None = None, **options: Any):
        super().__init__(**options)
        self.language = language

    def measures(self, predictions: list[str], references: list[str], language: str | None) -> Measures:
        normalise = normaliser(language)
        return measure_texts([normalise(text) for text in references], [normalise(text) for text in predictions])


@metrics.register("wer")
class WordErrorRate(TranscriptMetric):
    """Substituted, deleted and inserted words, as a fraction of the words that were said; it may exceed 1."""

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {"wer": self.measures(predictions, references, self.language).wer}


@metrics.register("cer")
class CharacterErrorRate(TranscriptMetric):
    """Substituted, deleted and inserted characters, as a fraction of those that were said; it may exceed 1."""

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        # The rules for languages without spaces put one after every letter, which would be counted here.
        language = None if code_of(self.language) in LETTERS else self.language
        return {"cer": self.measures(predictions, references, language).cer}


def metrics_for(names: list[str] | None, task: str, language: str | None = None) -> Metrics:
    """What the recipe measures.

    Args:
        names: registered metrics, or names on the Hub that `evaluate.load` knows; the first is the main one.
        task: `image-classification`, `text-classification`, `causal-lm` or `speech-recognition`.
        language: of speech.

    Raises:
        ConfigError: a metric that is of another task.
        NotReachable: a metric that is not registered, while the Hub can't be reached.
    """
    names = names or [DEFAULTS[task]]
    # A script, or a metric of someone's own on the Hub, goes by its last name, under which it gives its value.
    loaded = {Path(name).stem: _load(name, task, language) for name in names}
    main, first = next(iter(loaded.items()))
    grows = first.greater_is_better if isinstance(first, LocalMetric) else not shrinks(main)
    if task == "causal-lm":
        return Metrics(_TokenMetrics(loaded), token_sums, main, grows)
    if task == "speech-recognition":
        return Metrics(_TranscriptMetrics(loaded), predicted_tokens, main, grows)
    return Metrics(_ClassMetrics(loaded), predicted_classes, main, grows)


def predicted_classes(logits: Any, labels: Any) -> Tensor:
    """The class of the largest logit: (batch, classes) to (batch,)."""
    logits = logits[0] if isinstance(logits, tuple | list) else logits
    return logits.argmax(-1)


def predicted_tokens(logits: Any, labels: Any) -> Tensor:
    """The tokens that a recogniser writes: generated ones as they are, or the likeliest of each frame, from logits
    (batch, frames, vocabulary) to (batch, frames)."""
    logits = logits[0] if isinstance(logits, tuple | list) else logits
    if not logits.is_floating_point():
        return logits
    # Trainer fills up shorter batches of other processes with -100, which stays what it is.
    return logits.argmax(-1).masked_fill((logits == -100).all(-1), -100)


def token_sums(logits: Any, labels: Tensor) -> Tensor:
    """Of each sequence the negative log-likelihood, the number of tokens and of those predicted right: (batch, 3).

    Logits (batch, tokens, vocabulary) predict the next token, so that the labels are shifted by one; -100 is left out.
    Only these sums are kept, where the logits of a whole evaluation would not fit in memory.
    """
    logits = logits[0] if isinstance(logits, tuple | list) else logits
    targets = labels[:, 1:]
    counted = targets != -100
    predictions = logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        predictions.float().transpose(1, 2), targets.to(predictions.device), ignore_index=-100, reduction="none"
    )
    right = (predictions.argmax(-1) == targets) & counted
    return torch.stack([losses.sum(1), counted.sum(1).float(), right.sum(1).float()], dim=1)


class _ClassMetrics:
    def __init__(self, loaded: dict[str, evaluate.EvaluationModule]):
        self.loaded = loaded

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        predictions = _first(prediction.predictions)
        # Without preprocess_logits Trainer hands over the logits themselves.
        predictions = predictions.argmax(-1) if predictions.ndim > 1 else predictions
        return _computed(self.loaded, lambda _: (predictions, _first(prediction.label_ids)))


class _TokenMetrics:
    def __init__(self, loaded: dict[str, evaluate.EvaluationModule]):
        self.loaded = loaded

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        sums = np.asarray(_first(prediction.predictions), dtype=np.float64)
        columns = {"perplexity": sums[:, 0], "token_accuracy": sums[:, 2]}
        return _computed(self.loaded, lambda name: (columns[name], sums[:, 1]))


class _TranscriptMetrics:
    def __init__(self, loaded: dict[str, evaluate.EvaluationModule], processor: Any = None):
        self.loaded, self.processor = loaded, processor

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        predictions = texts_of(self.processor, _first(prediction.predictions))
        references = texts_of(self.processor, _first(prediction.label_ids), labels=True)
        return _computed(self.loaded, lambda _: (predictions, references))


def _computed(loaded: dict[str, evaluate.EvaluationModule], given: Callable[[str], tuple]) -> dict[str, float]:
    results: dict[str, float] = {}
    for name, metric in loaded.items():
        predictions, references = given(name)
        computed = metric.compute(predictions=predictions, references=references)
        results.update(computed)
        # A metric of the Hub may give its value another name; the main one is found by the name in the recipe.
        results.setdefault(name, next(iter(computed.values())))
    return {name: float(value) if np.isscalar(value) else value for name, value in results.items()}


def _first(values: Any) -> np.ndarray:
    return np.asarray(values[0] if isinstance(values, tuple | list) else values)


def _load(name: str, task: str, language: str | None) -> evaluate.EvaluationModule:
    known = [entry for entry in metrics if task in metrics[entry].tasks]
    if name in known:
        return metrics[name](language=language) if task == "speech-recognition" else metrics[name]()
    if name in metrics or task == "causal-lm":
        raise ConfigError(f"data.metrics: '{name}' is no metric for {task}; {did_you_mean(name, known)}")
    if not Path(name).exists():
        try:
            space = name if "/" in name else f"evaluate-metric/{name}"
            fetch("data.metrics", space, kind="space", patterns=["*.py"])
        except NotReachable:
            raise NotReachable(
                f"data.metrics: '{name}' is not built in and could not be had from the Hub; {did_you_mean(name, known)}"
            ) from None
    try:
        return evaluate.load(name)
    except (OSError, ImportError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"data.metrics: '{name}' can't be loaded: {lines[0]}") from error
