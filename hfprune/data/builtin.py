"""Data that needs no file and no network."""

from __future__ import annotations

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
