"""Small models to train from nothing, for runs that download nothing."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hfprune.data.builtin import builtin

END = "<|endoftext|>"


def small_llama(
    *,
    vocabulary: int = 1024,
    hidden_size: int = 128,
    intermediate_size: int = 352,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    positions: int = 256,
    text: str = "python_docs",
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A Llama with random weights, and a byte-level tokenizer made from an embedded text.

    In a recipe it is the model `hfprune.scratch:small_llama`, with these arguments under `model.args`.

    Args:
        vocabulary: tokens, at least the 256 bytes and the end of a text.
        hidden_size, intermediate_size: widths of the residual stream and of the feed-forward part.
        layers: decoder blocks.
        heads, kv_heads: attention heads, and those of keys and values.
        positions: the longest sequence, in tokens.
        text: `python_docs`, or `python_sentences`.
    """
    tokenizer = byte_tokenizer(builtin[text]()["train"]["text"], vocabulary)
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        bos_token_id=end,
        eos_token_id=end,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config), tokenizer


def byte_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer over bytes, made from texts: it can write down any text, and is the same every time.

    Source: Sennrich 2016, arXiv 1508.07909; over bytes as in GPT-2 (Radford 2019).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
