"""What belongs to a model and lies beside it: its tokenizer, its image processor, its processor of speech."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from hfprune.errors import ModelError
from hfprune.recipe import ModelSection

# What constructors raise for arguments that make no model.
BUILD_ERRORS = (TypeError, ValueError, RuntimeError, AssertionError, KeyError, AttributeError, ZeroDivisionError)


def processing_class_of(folder: Path, section: ModelSection, task: str) -> Any:
    """The tokenizer, which text needs; the processor, which speech needs; or the image processor, where there is one
    that is saved on its own.

    Raises:
        ModelError: what the task needs is not there, or can't be read.
    """
    if task == "speech-recognition":
        return _processor(folder, section)
    if task == "image-classification":
        if not (folder / "preprocessor_config.json").is_file():
            return None
        return AutoImageProcessor.from_pretrained(folder)
    # Without a vocabulary AutoTokenizer answers with an empty tokenizer, for which every word is unknown.
    if not any(next(folder.glob(pattern), None) for pattern in ("tokenizer*", "vocab*", "*.model", "tekken.json")):
        raise ModelError(f"model.name: '{section.name}' has no tokenizer; save the model's own beside it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, *BUILD_ERRORS) as error:
        raise ModelError(f"model.name: '{section.name}' has no readable tokenizer: {first_line(error)}") from error
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _processor(folder: Path, section: ModelSection) -> Any:
    """The feature extractor and the tokenizer of a recogniser."""
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ImportError, *BUILD_ERRORS) as error:
        raise ModelError(f"model.name: '{section.name}' has no readable processor: {first_line(error)}") from error
    if not hasattr(processor, "feature_extractor") or not hasattr(processor, "tokenizer"):
        raise ModelError(
            f"model.name: '{section.name}' has no processor of a feature extractor and a tokenizer, which "
            "speech-recognition needs; save them beside the model"
        )
    return processor


def first_line(error: Exception) -> str:
    """What an error says, short enough for one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:400] if lines else type(error).__name__
