"""Metrics against their definitions, without a network."""

import math

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from hfprune.errors import ConfigError, NotReachable
from hfprune.metrics import Metrics, metrics, metrics_for


def test_accuracy_is_what_classification_measures_by_default():
    bundle = metrics_for(None, "image-classification")
    assert isinstance(bundle, Metrics)
    assert (bundle.main, bundle.greater_is_better) == ("accuracy", True)
    logits = torch.tensor([[3.0, 1.0], [0.0, 2.0], [5.0, 4.0], [1.0, 0.0]])
    predictions = bundle.preprocess_logits(logits, None)
    result = bundle.compute(EvalPrediction(predictions=predictions.numpy(), label_ids=np.array([0, 1, 1, 0])))
    assert result == {"accuracy": 0.75}


def test_logits_in_a_tuple_or_not_reduced_at_all_give_the_same():
    bundle = metrics_for(["accuracy"], "text-classification")
    logits = torch.tensor([[3.0, 1.0], [0.0, 2.0], [5.0, 4.0]])
    labels = np.array([0, 1, 1])
    reduced = bundle.preprocess_logits((logits, torch.zeros(1)), None)
    assert torch.equal(reduced, torch.tensor([0, 1, 0]))
    whole = bundle.compute(EvalPrediction(predictions=logits.numpy(), label_ids=labels))
    assert whole == bundle.compute(EvalPrediction(predictions=reduced.numpy(), label_ids=labels))


def test_f1_and_matthews_by_hand():
    bundle = metrics_for(["f1", "matthews_correlation"], "text-classification")
    predictions, labels = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])
    result = bundle.compute(EvalPrediction(predictions=predictions, label_ids=labels))
    # class 1: precision 2/3, recall 2/3; class 0: precision 1/2, recall 1/2
    assert result["f1"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert result["matthews_correlation"] == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))


def test_perplexity_weighs_tokens_not_sequences():
    torch.manual_seed(0)
    bundle = metrics_for(None, "causal-lm")
    assert (bundle.main, bundle.greater_is_better) == ("perplexity", False)
    logits, labels = torch.randn(3, 6, 7), torch.randint(0, 7, (3, 6))
    labels[0, 2:] = -100
    sums = bundle.preprocess_logits(logits, labels)
    assert sums.shape == (3, 3)
    assert sums[:, 1].tolist() == [1, 5, 5]
    flat, targets = logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1)
    expected = torch.nn.functional.cross_entropy(flat, targets).exp().item()
    result = bundle.compute(EvalPrediction(predictions=sums.numpy(), label_ids=labels.numpy()))
    assert result["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_token_accuracy_counts_only_labelled_tokens():
    bundle = metrics_for(["token_accuracy", "perplexity"], "causal-lm")
    assert (bundle.main, bundle.greater_is_better) == ("token_accuracy", True)
    labels = torch.tensor([[0, 1, 2, 1], [0, 2, -100, -100]])
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 2, 2, 0], [1, 0, 0, 0]]), 3).float()
    sums = bundle.preprocess_logits(logits, labels)
    result = bundle.compute(EvalPrediction(predictions=sums.numpy(), label_ids=labels.numpy()))
    assert result["token_accuracy"] == pytest.approx(2 / 4)


@pytest.mark.parametrize(("nll", "check"), [(1e6, math.isinf), (math.nan, math.isnan)])
def test_a_broken_model_is_infinitely_perplexed_and_nan_stays_nan(nll, check):
    bundle = metrics_for(None, "causal-lm")
    sums = np.array([[nll, 10.0, 0.0]])
    assert check(bundle.compute(EvalPrediction(predictions=sums, label_ids=None))["perplexity"])


@pytest.mark.parametrize("name", list(metrics))
def test_every_registered_metric_says_how_it_is_used(name):
    metric = metrics[name]()
    assert metric.tasks
    assert isinstance(metric.greater_is_better, bool)
    kind = str if metric.dtype == "string" else int
    result = metric.compute(predictions=[kind(n) for n in (1, 1, 2, 1)], references=[kind(n) for n in (1, 2, 2, 1)])
    assert math.isfinite(result[name])


@pytest.mark.parametrize(
    ("name", "task"), [("perplexity", "image-classification"), ("accuracy", "causal-lm"), ("rouge", "causal-lm")]
)
def test_a_metric_of_another_task_is_refused_with_those_that_fit(name, task):
    with pytest.raises(ConfigError, match=rf"^data\.metrics: '{name}' is no metric for {task}; (known|did you mean)"):
        metrics_for([name], task)


def test_an_unknown_name_is_sought_on_the_hub_and_answered_with_the_nearest(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NotReachable, match="did you mean 'accuracy'") as caught:
        metrics_for(["acuracy"], "image-classification")
    assert str(caught.value).startswith("data.metrics: 'acuracy' is not built in and could not be had from the Hub")
    assert "\n" not in str(caught.value)


def test_a_metric_of_the_users_own_script(tmp_path):
    script = tmp_path / "error_rate.py"
    script.write_text(
        "import datasets\nimport evaluate\n"
        "class ErrorRate(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        value = datasets.Value('int64')\n"
        "        features = datasets.Features({'predictions': value, 'references': value})\n"
        "        return evaluate.MetricInfo(description='', citation='', features=features)\n"
        "    def _compute(self, predictions, references):\n"
        "        wrong = sum(p != r for p, r in zip(predictions, references))\n"
        "        return {'error_rate': wrong / len(references)}\n"
    )
    bundle = metrics_for([str(script)], "text-classification")
    result = bundle.compute(EvalPrediction(predictions=np.array([0, 1, 1, 1]), label_ids=np.array([0, 1, 1, 0])))
    assert bundle.main == "error_rate"
    assert result == {"error_rate": 0.25}
