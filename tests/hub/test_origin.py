"""What is taken from the base model's own card, and what is not."""

import json

import pytest
import timm

from hfprune.hub.origin import read_origin
from hfprune.models import load_model
from hfprune.recipe import ModelSection

CARD = """\
---
license: other
license_name: small-licence
license_link: LICENSE
language: [en, no, 7, English]
datasets: imagenet-1k
base_model: me/dense
tags: [theirs]
---
# dense
"""


def test_licence_languages_data_and_base_model(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    assert read_origin(tmp_path) == {
        "license": "other",
        "license_name": "small-licence",
        "license_link": "LICENSE",
        "language": ["en"],  # `no` is false in YAML, and a word is no code
        "datasets": ["imagenet-1k"],
        "base_model": ["me/dense"],
    }


@pytest.mark.parametrize("text", [None, "", "# no metadata", "---\nlicense: [\n---\n", "---\n- a\n---\n", "---\n---\n"])
def test_a_card_that_says_nothing_stops_nobody(tmp_path, text):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert read_origin(tmp_path) == {}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"license": "mit"}}))
    assert read_origin(tmp_path) == {"license": "mit"}
    (tmp_path / "config.json").write_text("no json")
    assert read_origin(tmp_path) == {}


def test_a_local_model_passes_its_licence_on_with_its_weights(tmp_path):
    sizes = {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4], "stem_width": 4, "num_classes": 2}
    timm.models.save_for_hf(timm.create_model("resnet18", **sizes), str(tmp_path), safe_serialization=True)
    (tmp_path / "README.md").write_text(CARD)
    section = ModelSection(name=str(tmp_path))
    assert load_model(section, "image-classification", ["a", "b"]).origin["license_name"] == "small-licence"
    bare = section.model_copy(update={"pretrained": False})
    assert load_model(bare, "image-classification", ["a", "b"]).origin == {}
