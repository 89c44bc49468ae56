"""Data that needs no file and no network."""

from __future__ import annotations

from pydoc_data.topics import topics

import numpy as np
from datasets import Array2D, ClassLabel, Dataset, Features
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from hfprune.registry import Registry

builtin = Registry("embedded dataset")


@builtin.register("digits")
def digits() -> dict[str, Dataset]:
    """1,797 handwritten digits of 8 x 8 grey pixels in [0, 1]: 1,437 to train on and 360 to evaluate on.

    The split is stratified and always the same, so that runs with different seeds are measured on the same images.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (test part), UCI, as in scikit-learn.
    """
    source = load_digits()
    images = (source.images / 16).astype(np.float32)
    features = Features({"image": Array2D((8, 8), "float32"), "label": ClassLabel(names=[str(i) for i in range(10)])})
    train, evaluation = train_test_split(np.arange(len(images)), test_size=360, stratify=source.target, random_state=0)
    return {
        name: Dataset.from_dict({"image": images[rows], "label": source.target[rows]}, features=features)
        for name, rows in (("train", np.sort(train)), ("test", np.sort(evaluation)))
    }


@builtin.register("python_docs")
def python_docs() -> dict[str, Dataset]:
    """The reference texts behind Python's own `help()`, one row a topic in alphabetical order: English prose with code,
    some 700,000 characters, of which every tenth topic is to evaluate on.

    They come with every Python, and differ a little between its versions.
    """
    texts = [topics[name] for name in sorted(topics)]
    return {
        "train": Dataset.from_dict({"text": [text for index, text in enumerate(texts) if index % 10 != 9]}),
        "test": Dataset.from_dict({"text": texts[9::10]}),
    }
