"""n-best lists of a recogniser: by beam search where it writes, by prefix beam search where it gives CTC's frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationMixin

from hfprune.errors import DataError, ModelError
from hfprune.speech.audio import RATE, resampled
from hfprune.speech.ctc import Bonus, WordFusion, prefix_beam_search
from hfprune.speech.nbest import Hypothesis
from hfprune.speech.normalise import code_of
from hfprune.speech.recognisers import frames_of
from hfprune.speech.rescoring import LanguageModel

Recogniser = Callable[[np.ndarray], tuple[Hypothesis, ...]]
"""From samples (samples,) at `RATE` to hypotheses, the likeliest first, each text once."""


@dataclass(frozen=True)
class Fusion:
    """A language model that takes part in the search.

    Attributes:
        model: the language model.
        weight, penalty: of its log-probability, and of a word.
    """

    model: LanguageModel
    weight: float = 0.5
    penalty: float = 0.0


def recogniser(
    model: nn.Module,
    processor: Any,
    count: int = 8,
    language: str | None = None,
    width: int | None = None,
    fusion: Fusion | None = None,
) -> Recogniser:
    """The n-best lists of a model, whichever of the two kinds it is.

    Args:
        model: with a CTC head, or an encoder and a decoder that writes.
        processor: its processor: feature extractor and tokenizer.
        count: the most of a list.
        language: what a multilingual model that writes is told to expect.
        width: of the beam; by default `count` for a model that writes, and four times as wide, at least 16, for CTC.
        fusion: a language model that takes part; for CTC alone.

    Raises:
        ModelError: the model is no recogniser, or one that writes, and a language model is to take part.
    """
    config = getattr(model, "config", None)
    if config is not None and config.is_encoder_decoder and model.can_generate():
        if fusion is not None:
            raise ModelError(f"shallow fusion is for CTC, and {type(model).__name__} writes; rescore its lists instead")
        return lambda samples: written(model, processor, samples, count, language, width)
    if hasattr(model, "lm_head") and type(model).__name__.endswith("ForCTC"):
        return lambda samples: heard(model, processor, samples, count, width, fusion)
    raise ModelError(f"{type(model).__name__} is no recogniser: it neither has a CTC head nor writes what it hears")


@torch.inference_mode()
def written(
    model: nn.Module,
    processor: Any,
    samples: np.ndarray,
    count: int = 8,
    language: str | None = None,
    width: int | None = None,
) -> tuple[Hypothesis, ...]:
    """The n-best list of a model that writes, by transformers' beam search.

    A score is the log-probability of all tokens after the prompt: what the search divided by the length is multiplied
    by it again, so that it may be added to that of a language model.

    Args:
        model: an encoder and a decoder, such as Whisper.
        processor: its processor.
        samples: (samples,) at `RATE`, no longer than the model takes at once.
        count: the most of the list.
        language: of a multilingual model; found by itself where it is left out.
        width: of the beam, no less than `count`, which it is by default.

    Raises:
        DataError: longer samples, of which Whisper would hear the beginning alone.
        ModelError: a language that the model does not know.
    """
    limit, seconds = getattr(processor.feature_extractor, "n_samples", None), len(samples) / RATE
    if limit is not None and seconds > (most := limit / processor.feature_extractor.sampling_rate):
        raise DataError(f"{seconds:.1f} s of sound, and the recogniser takes {most:.1f} s at once")
    inputs = _inputs(model, processor, samples)
    prompt = {"decoder_input_ids": whisper_prompt(model, inputs, language)} if _is_whisper(model) else {}
    # Whisper's own generate takes several sequences for several recordings, and gives the best one again and again.
    found = GenerationMixin.generate(
        model,
        **inputs,
        **prompt,
        **_longest(model),
        num_beams=width or count,
        num_return_sequences=count,
        do_sample=False,
        length_penalty=1.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    lengths = (found.beam_indices >= 0).sum(1).clamp(min=1)  # the tokens after the prompt, the end among them
    texts = processor.tokenizer.batch_decode(found.sequences, skip_special_tokens=True)
    scores = (found.sequences_scores * lengths).tolist()
    return _each_once([Hypothesis(text.strip(), score) for text, score in zip(texts, scores, strict=True)])


def whisper_prompt(model: nn.Module, inputs: Any, language: str | None) -> torch.Tensor:
    """The tokens that Whisper begins with, (1, tokens): the start, of a multilingual model the language, which it finds
    by itself where none is said, and the task, and that there are no times.

    Raises:
        ModelError: a language that the model does not know.
    """
    said = model.generation_config
    ids = [model.config.decoder_start_token_id]
    if getattr(said, "is_multilingual", False):
        if language is None:
            ids.append(int(model.detect_language(**inputs)[0]))
        elif (token := f"<|{code_of(language)}|>") in said.lang_to_id:
            ids.append(said.lang_to_id[token])
        else:
            raise ModelError(f"the recogniser does not know the language '{language}'")
        ids.append(said.task_to_id["transcribe"])
    if getattr(said, "no_timestamps_token_id", None) is not None:
        ids.append(said.no_timestamps_token_id)
    return torch.tensor([ids], device=model.device)


def _inputs(model: nn.Module, processor: Any, samples: np.ndarray) -> Any:
    """What the model takes of samples (samples,) at `RATE`, as a batch of one."""
    extractor = processor.feature_extractor
    rate = extractor.sampling_rate
    inputs = extractor(resampled(samples, RATE, rate), sampling_rate=rate, return_tensors="pt")
    return inputs.to(next(model.parameters()).device)


def _longest(model: nn.Module) -> dict[str, int]:
    """As long a text as the model can write, where it says no other limit: transformers' own is 20 tokens."""
    said, positions = model.generation_config, getattr(model.config, "max_target_positions", None)
    if positions is None or said.max_length is not None or said.max_new_tokens is not None:
        return {}
    return {"max_length": positions}


def _is_whisper(model: nn.Module) -> bool:
    return model.config.model_type == "whisper"


@torch.inference_mode()
def heard(
    model: nn.Module,
    processor: Any,
    samples: np.ndarray,
    count: int = 8,
    width: int | None = None,
    fusion: Fusion | None = None,
) -> tuple[Hypothesis, ...]:
    """The n-best list of a model with a CTC head, by prefix beam search; with a language model by shallow fusion at the
    ends of words, and the scores are then the sums.

    Args:
        model: such as Wav2Vec2 or HuBERT.
        processor: its processor; its tokenizer's padding is CTC's blank.
        samples: (samples,) at `RATE`.
        count: the most of the list.
        width: of the beam; by default four times the list, at least 16.
        fusion: a language model that takes part.

    Raises:
        DataError: too little sound for a single frame.
    """
    inputs = _inputs(model, processor, samples)
    if "input_values" in inputs and frames_of(model, inputs["input_values"].shape[-1]) < 1:
        raise DataError(f"{len(samples) / RATE:.3f} s of sound, too little for a single frame")
    frames = torch.log_softmax(model(**inputs).logits[0].float(), dim=-1).double().cpu().numpy()
    tokenizer = processor.tokenizer
    units = ctc_units(tokenizer, frames.shape[1])
    bonus: Bonus | None = None
    if fusion is not None:
        bonus = WordFusion(fusion.model, units, fusion.weight, fusion.penalty)
    beams = prefix_beam_search(
        frames, blank=tokenizer.pad_token_id, width=width or max(16, 4 * count), units=20, bonus=bonus
    )
    said = [Hypothesis(" ".join("".join(units[i] for i in beam.ids).split()), beam.total) for beam in beams]
    return _each_once(said)[:count]


def ctc_units(tokenizer: Any, count: int) -> list[str]:
    """What each unit of a CTC tokenizer writes: a space for the one between words, nothing for special ones; small
    letters where it knows capitals alone, as language models read them."""
    delimiter = getattr(tokenizer, "word_delimiter_token", "|")
    special = set(tokenizer.all_special_ids)
    words = [tokenizer.convert_ids_to_tokens(unit) if unit < len(tokenizer) else "" for unit in range(count)]
    if not any(word.islower() for unit, word in enumerate(words) if unit not in special):
        words = [word.lower() for word in words]
    return [
        " " if word == delimiter else "" if unit in special or not word else word for unit, word in enumerate(words)
    ]


def _each_once(hypotheses: list[Hypothesis]) -> tuple[Hypothesis, ...]:
    """The likeliest first; of those with one text the likeliest."""
    ranked = sorted(hypotheses, key=lambda one: -one.score)
    return tuple({one.text: one for one in reversed(ranked)}[text] for text in dict.fromkeys(o.text for o in ranked))
