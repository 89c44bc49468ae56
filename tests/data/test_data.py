"""Data by its name in the recipe: splits, columns, classes, samples, and what wrong names are answered with."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image

from hfprune.data import open_data
from hfprune.errors import ConfigError, DataError, NotReachable
from hfprune.recipe import DataSection


def opened(name, seed=0, **section):
    return open_data(DataSection(name=str(name), **section), seed)


def write_csv(path, header, rows):
    path.write_text("\n".join([",".join(header), *(",".join(map(str, row)) for row in rows)]) + "\n")


def write_images(root, classes, count=3, size=(6, 6)):
    generator = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")


def test_digits_are_split_alike_for_every_seed():
    first, second = opened("digits", seed=0), opened("digits", seed=1)
    assert (len(first.train), len(first.evaluation)) == (1437, 360)
    assert first.labels == [str(i) for i in range(10)]
    assert first.evaluation["label"][:] == second.evaluation["label"][:]
    shares = np.bincount(first.evaluation["label"][:])
    assert shares.min() >= 34
    images = np.array(first.train["image"][:])
    assert images.shape == (1437, 8, 8)
    assert (images.min(), images.max()) == (0.0, 1.0)


def test_samples_are_drawn_by_the_seed():
    section = {"train_samples": 50, "eval_samples": 20}
    first, again, other = opened("digits", 3, **section), opened("digits", 3, **section), opened("digits", 4, **section)
    assert (len(first.train), len(first.evaluation)) == (50, 20)
    assert first.train["label"][:] == again.train["label"][:]
    assert first.train["label"][:] != other.train["label"][:]


def test_a_folder_of_images_has_a_class_a_folder(tmp_path):
    write_images(tmp_path, ["dog", "cat"], count=10)
    raw = opened(tmp_path)
    assert raw.labels == ["cat", "dog"]
    assert (len(raw.train), len(raw.evaluation)) == (16, 4)
    assert sorted(raw.evaluation["label"][:]) == [0, 0, 1, 1]


def test_a_folder_of_images_with_splits_above(tmp_path):
    write_images(tmp_path / "train", ["cat", "dog"], count=4)
    write_images(tmp_path / "validation", ["dog"], count=2)
    raw = opened(tmp_path)
    assert (len(raw.train), len(raw.evaluation)) == (8, 2)
    assert raw.evaluation["label"][:] == [1, 1]


def test_a_class_that_training_lacks_is_refused(tmp_path):
    write_images(tmp_path / "train", ["cat", "dog"], count=2)
    write_images(tmp_path / "test", ["cat", "dogs"], count=2)
    with pytest.raises(DataError, match="train/ lacks; did you mean 'dog'"):
        opened(tmp_path)


def test_string_labels_become_the_same_indices_in_every_split(tmp_path):
    write_csv(tmp_path / "train.csv", ["text", "label"], [("a b", "pos"), ("c d", "neg"), ("e f", "so-so")])
    write_csv(tmp_path / "test.csv", ["text", "label"], [("g h", "so-so"), ("i j", "pos")])
    raw = opened(tmp_path, task="text-classification")
    assert raw.labels == ["neg", "pos", "so-so"]
    assert raw.train["label"][:] == [1, 0, 2]
    assert raw.evaluation["label"][:] == [2, 1]


def test_numbers_with_gaps_become_indices(tmp_path):
    write_csv(tmp_path / "all.csv", ["sentence", "target"], [(f"text {i}", (3, 7)[i % 2]) for i in range(10)])
    raw = opened(tmp_path / "all.csv", task="text-classification", eval_fraction=0.4)
    assert raw.labels == ["3", "7"]
    assert (len(raw.train), len(raw.evaluation)) == (6, 4)
    assert sorted(raw.evaluation["label"][:]) == [0, 0, 1, 1]


def test_what_is_held_out_is_no_part_of_training(tmp_path):
    write_csv(tmp_path / "all.csv", ["text", "label"], [(f"t{i}", i % 2) for i in range(20)])
    raw = opened(tmp_path / "all.csv", task="text-classification")
    train, evaluation = set(raw.train["text"][:]), set(raw.evaluation["text"][:])
    assert (len(train), len(evaluation)) == (16, 4)
    assert not train & evaluation


def test_a_test_split_without_labels_is_passed_over(tmp_path):
    header = ["sentence", "label"]
    write_csv(tmp_path / "train.csv", header, [("a", 0), ("b", 1)])
    write_csv(tmp_path / "validation.csv", header, [("c", 1)])
    write_csv(tmp_path / "test.csv", header, [("d", -1), ("e", -1)])
    assert opened(tmp_path, task="text-classification").evaluation["text"][:] == ["c"]
    with pytest.raises(DataError, match="no labelled row"):
        opened(tmp_path, task="text-classification", eval_split="test")


def test_unlabelled_rows_are_left_out(tmp_path):
    write_csv(tmp_path / "train.csv", ["text", "label"], [("a", 0), ("b", -1), ("c", 1)])
    write_csv(tmp_path / "test.csv", ["text", "label"], [("d", 0)])
    assert opened(tmp_path, task="text-classification").train["text"][:] == ["a", "c"]


def test_pairs_of_texts_are_found(tmp_path):
    rows = [("p1", "h1", 0), ("p2", "h2", 1)]
    write_csv(tmp_path / "train.csv", ["premise", "hypothesis", "label"], rows)
    write_csv(tmp_path / "test.csv", ["premise", "hypothesis", "label"], rows)
    raw = opened(tmp_path, task="text-classification")
    assert raw.train[1] == {"text": "p2", "text_pair": "h2", "label": 1}


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_other_kinds_of_files(tmp_path, kind):
    rows = [{"review": f"text {i}", "label": i % 2} for i in range(10)]
    path = tmp_path / f"reviews.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        lines = "\n".join(json.dumps(row) for row in rows)
        path.write_text(lines if kind == "jsonl" else json.dumps(rows))
    raw = opened(path, task="text-classification")
    assert (len(raw.train), len(raw.evaluation)) == (8, 2)
    assert raw.train.column_names == ["text", "label"]


def test_images_in_parquet_as_the_hub_lays_them_out(tmp_path):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["b", "a"])})
    pictures = [Image.fromarray(np.full((4, 4, 3), 40 * i, dtype=np.uint8)) for i in range(6)]
    rows = datasets.Dataset.from_dict({"img": pictures, "label": [0, 1, 0, 1, 0, 1]}, features=features)
    (tmp_path / "plain_text").mkdir()
    for split in ("train", "test"):
        rows.to_parquet(tmp_path / "plain_text" / f"{split}-00000-of-00001.parquet")
    raw = opened(tmp_path)
    assert raw.labels == ["b", "a"]
    assert raw.train.column_names == ["image", "label"]
    assert raw.train[2]["image"].size == (4, 4)


def test_a_running_text_keeps_its_order(tmp_path):
    (tmp_path / "train.txt").write_text("".join(f"line {i}\n" for i in range(20)))
    raw = opened(tmp_path / "train.txt", task="causal-lm", train_samples=5)
    assert raw.labels is None
    assert raw.lines
    assert raw.evaluation["text"][:] == [f"line {i}\n" for i in range(16, 20)]
    first = int(raw.train["text"][0].split()[1])
    assert raw.train["text"][:] == [f"line {i}\n" for i in range(first, first + 5)]


@pytest.mark.parametrize(
    ("section", "error", "line"),
    [
        ({"image_column": "imag"}, ConfigError, r"data\.image_column: .*no column 'imag'; did you mean 'image'"),
        ({"label_column": "lable"}, ConfigError, r"data\.label_column: .*no column 'lable'; did you mean 'label'"),
        ({"train_split": "trian"}, ConfigError, r"data\.train_split: .*no split 'trian'; did you mean 'train'"),
        ({"eval_split": "tets"}, ConfigError, r"data\.eval_split: .*no split 'tets'; did you mean 'test'"),
        ({"eval_split": "train"}, ConfigError, r"data\.eval_split: 'train' is the training split"),
        ({"task": "text-classification"}, ConfigError, r"data\.text_columns: no column of 'digits' looks like text"),
        (
            {"label_column": "image"},
            ConfigError,
            r"data\.label_column: 'image' is the column of the image; name another",
        ),
        (
            {"task": "causal-lm", "text_columns": ["label"]},
            ConfigError,
            r"data\.text_columns: 'label' .*ClassLabel, which is no text",
        ),
        ({"task": "causal-lm", "text_columns": ["a", "b"]}, ConfigError, r"data\.text_columns: causal-lm takes 1 to 1"),
    ],
)
def test_wrong_columns_and_splits_are_answered_in_one_line(section, error, line):
    with pytest.raises(error, match=line) as caught:
        opened("digits", **section)
    assert "\n" not in str(caught.value)


def test_several_columns_that_could_be_the_classes(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "x": datasets.ClassLabel(names=["a", "b"]), "y": datasets.ClassLabel(2)}
    )
    rows = datasets.Dataset.from_dict({"text": ["t"] * 4, "x": [0, 1] * 2, "y": [1, 0] * 2}, features=features)
    rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ConfigError, match=r"data\.label_column: several columns .* name one of text, x, y"):
        opened(tmp_path, task="text-classification")
    assert opened(tmp_path, task="text-classification", label_column="x", eval_fraction=0.5).labels == ["a", "b"]


@pytest.mark.parametrize(
    ("labels", "line"),
    [([0.5, 1.5, 2.5], "are float64, which are no classes"), ([1, 1, 1], "has 1 classes; at least 2")],
)
def test_labels_that_are_no_classes(tmp_path, labels, line):
    write_csv(tmp_path / "all.csv", ["text", "label"], [("t", label) for label in labels])
    with pytest.raises(DataError, match=line):
        opened(tmp_path / "all.csv", task="text-classification")


def test_labels_that_are_images(tmp_path):
    write_images(tmp_path / "pictures", ["a"])
    files = sorted(str(path) for path in (tmp_path / "pictures").rglob("*.png"))
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    for split in ("train", "test"):
        rows = datasets.Dataset.from_dict({"image": files, "mask": files}, features=features)
        rows.to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(DataError, match=r"data\.label_column: labels of .* are Image, which are no classes"):
        opened(tmp_path, image_column="image", label_column="mask")


def test_paths_that_are_wrong(tmp_path):
    (tmp_path / "reviews.csv").write_text("text,label\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match=r"data\.name: no file or folder '.*reviws\.csv'; did you mean '.*reviews\.csv'"
    ):
        opened(tmp_path / "reviws.csv", task="text-classification")
    with pytest.raises(DataError, match="nor a sub-folder of images for each class"):
        opened(tmp_path / "empty")
    (tmp_path / "data.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"not of a known kind; known: \.parquet"):
        opened(tmp_path / "data.xlsx")
    (tmp_path / "broken.json").write_text("{not json")
    with pytest.raises(DataError, match="can't be read") as caught:
        opened(tmp_path / "broken.json", task="text-classification")
    assert "\n" not in str(caught.value)


def test_too_little_to_hold_out(tmp_path):
    write_csv(tmp_path / "all.csv", ["text"], [("only",)])
    with pytest.raises(DataError, match=r"data\.eval_fraction: 0\.2 of 1 rows leaves none to train on"):
        opened(tmp_path / "all.csv", task="causal-lm")


def test_a_hub_out_of_reach_is_said_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NotReachable) as caught:
        opened("uoft-cs/cifar10")
    assert str(caught.value) == (
        "data.name: 'uoft-cs/cifar10' could not be reached on the Hub (offline mode is on); "
        "download it where there is a connection and give its folder: --set data.name=PATH"
    )
    with pytest.raises(NotReachable, match="or did you mean the embedded 'digits'"):
        opened("digit")
