"""Data that needs no file and no network."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from datasets import Array2D, ClassLabel, Dataset, Features
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from hfprune.registry import Registry

builtin = Registry("embedded dataset")
_NO_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}


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


@builtin.register("python_sentences")
def python_sentences() -> dict[str, Dataset]:
    """English sentences as they would be said, small letters without marks: those of `python_docs` and of the standard
    library's docstrings that are made of 4 to 20 plain words, each once; some 12,000.

    Of every ten neighbouring groups of 20, one is to evaluate on (`validation`) and one is kept for what comes
    last (`test`). They come with every Python, and differ a little between its versions.
    """
    found = list(_sentences())
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for index, sentence in enumerate(found):
        parts[{8: "validation", 9: "test"}.get(index // 20 % 10, "train")].append(sentence)
    return {name: Dataset.from_dict({"text": texts}) for name, texts in parts.items()}


@lru_cache
def _sentences() -> tuple[str, ...]:
    texts = [topics[name] for name in sorted(topics)] + list(_docstrings(Path(sysconfig.get_paths()["stdlib"])))
    return tuple(dict.fromkeys(sentence for text in texts for sentence in spoken_sentences(text)))


def spoken_sentences(text: str) -> Iterator[str]:
    """The sentences of a text that are 4 to 20 plain words, in small letters and without marks."""
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in re.split(r"(?<=[.!?:;])\s+", " ".join(paragraph.split())):
            bare = re.sub(r"[\"*()“”,.;:!?`-]", " ", sentence.replace("’", "'")).lower()
            words = bare.split()
            if 4 <= len(words) <= 20 and all(re.fullmatch(r"[a-z]+('[a-z]+)?", word) for word in words):
                yield " ".join(words)


def _docstrings(folder: Path) -> Iterator[str]:
    """Whatever stands between three double quotes in the sources below a folder."""
    for path in sorted(folder.rglob("*.py")):
        if not _NO_LIBRARY & set(path.relative_to(folder).parts):
            yield from re.findall(r'"""(.+?)"""', path.read_text(encoding="utf-8", errors="ignore"), re.DOTALL)
