"""Recognisers: which models are some, of what kind, and what of their answers counts."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, Wav2Vec2CTCTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CTC_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

Kind = Literal["ctc", "seq2seq"]


def kind_of_config(config: PreTrainedConfig) -> Kind | None:
    """How the recognisers of a config write: a letter a frame (`ctc`), or one token after another (`seq2seq`); None
    where it is of no recogniser."""
    if config.model_type in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES:
        return "seq2seq"
    return "ctc" if config.model_type in MODEL_FOR_CTC_MAPPING_NAMES else None


def kind_of(model: nn.Module) -> Kind | None:
    """How a recogniser writes; None for a model that is none, for example one without the head that writes."""
    return kind_of_classes({kind.__name__ for kind in type(model).__mro__})


def kind_of_classes(names: set[str]) -> Kind | None:
    """How a recogniser writes that is of one of these classes of transformers; None where none is a recogniser's."""
    if names & set(MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.values()):
        return "seq2seq"
    return "ctc" if names & set(MODEL_FOR_CTC_MAPPING_NAMES.values()) else None


def frames_of(model: nn.Module, samples: int) -> int:
    """How many frames a CTC model makes of so many samples."""
    return int(model._get_feat_extract_output_lengths(samples))


def without_padding(model: nn.Module, logits: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    """A CTC model's logits (batch, frames, vocabulary) with nothing but the blank in frames that are padding: what
    stands there is never trained, and would be read as letters."""
    mask = inputs.get("attention_mask")
    if mask is None or kind_of(model) != "ctc":
        return logits
    lengths = model._get_feat_extract_output_lengths(mask.sum(-1)).to(logits.device)
    padding = torch.arange(logits.shape[1], device=logits.device)[None, :] >= lengths[:, None]
    blank = torch.full((logits.shape[2],), torch.finfo(logits.dtype).min, dtype=logits.dtype, device=logits.device)
    blank[model.config.pad_token_id] = 0
    return torch.where(padding[:, :, None], blank, logits)


def generated(model: nn.Module, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    """The tokens (batch, tokens) that a model with a decoder writes on inputs, whatever it was to write.

    Args:
        options: of `generate`; those that are None are left to the model.
    """
    heard = {name: value for name, value in inputs.items() if name not in ("labels", "decoder_input_ids")}
    if "force_unique_generate_call" in inspect.signature(model.generate).parameters:
        # Whisper would begin anew after each mark of time that it writes, which those in training write at random.
        options["force_unique_generate_call"] = True
    with torch.no_grad():
        return model.generate(**heard, **{name: value for name, value in options.items() if value is not None})


def texts_of(processor: Any, tokens: np.ndarray | Sequence[Sequence[int]], *, labels: bool = False) -> list[str]:
    """What recognisers have written, or were to write.

    Args:
        processor: the model's processor or tokenizer.
        tokens: (batch, tokens) of a decoder, or the likeliest of each frame; negative ones are padding.
        labels: they are labels, in which two letters that are alike are two.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    rows = [[int(token) for token in row if token >= 0] for row in tokens]
    if isinstance(tokenizer, Wav2Vec2CTCTokenizer):
        # Without special tokens it would drop the blanks first, and take two letters with a blank between for one.
        return tokenizer.batch_decode(rows, skip_special_tokens=False, group_tokens=not labels)
    return tokenizer.batch_decode(rows, skip_special_tokens=True)
