"""Metadata that the Hub would not take is an error before anything is written."""

from pathlib import Path

import pytest

from hfprune.errors import ConfigError
from hfprune.hub.validation import check_card

GOOD = """\
---
library_name: timm
pipeline_tag: image-classification
license: apache-2.0
base_model: timm/resnet18.a1_in1k
base_model_relation: finetune
datasets:
- cifar10
language: en
tags: [pruned]
co2_eq_emissions: {emissions: 0.4, source: codecarbon}
model-index:
- name: small
  results:
  - task: {type: image-classification}
    dataset: {name: CIFAR-10, type: cifar10}
    metrics:
    - {type: accuracy, value: 0.9}
---
# small
"""
BAD = [
    ("---\nlibrary_name", "library_name", "has no metadata"),
    ("library_name: timm", "library_name: [timm", "can't be read"),
    ("library_name: timm", "library_name: tim", "library_name: unknown library 'tim'; did you mean 'timm'"),
    ("pipeline_tag: image-classification", "pipeline_tag: Image Classification", "pipeline_tag: .*pattern"),
    ("license: apache-2.0", "license: 2.0", "license.*valid string, not 2.0"),
    ("base_model: timm/resnet18.a1_in1k", "base_model: /data/dense", "base_model.*pattern"),
    ("base_model: timm/resnet18.a1_in1k\n", "", "base_model_relation: there is no base_model"),
    ("base_model_relation: finetune", "base_model_relation: pruned", "base_model_relation: .*not 'pruned'"),
    ("- cifar10", "- ./pets of mine", "datasets.*pattern"),
    ("language: en", "language: English", "language.*pattern"),
    ("tags: [pruned]", "tags: pruned", "tags: .*valid list"),
    ("emissions: 0.4", "emissions: -1", "emissions: .*greater than or equal to 0"),
    ("type: cifar10", "type: ''", "dataset.type"),
    ("type: accuracy, value: 0.9", "type: accuracy, value: .nan", "value: .*finite number"),
    ("type: accuracy, value: 0.9", "type: accuracy", "value: field required"),
    ("    - {type: accuracy, value: 0.9}\n", "", "metrics: "),
]


def test_a_good_card_passes():
    check_card(GOOD)
    check_card((Path(__file__).parents[2] / "model_cards" / "example" / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("old", "new", "message"), BAD, ids=[f"{new or 'without'} {m}" for _, new, m in BAD])
def test_bad_metadata_is_one_line_that_names_the_key(old, new, message):
    assert old in GOOD
    with pytest.raises(ConfigError, match=message) as raised:
        check_card(GOOD.replace(old, new, 1))
    assert "\n" not in str(raised.value)
