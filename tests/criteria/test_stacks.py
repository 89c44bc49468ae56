"""Blocks are found by how data flows, in models of every kind, and run again as the model runs them."""

import pytest
import timm
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import hfprune
from hfprune import PruningConfig
from hfprune.criteria.stacks import Replay, find_stacks, forward_of, still
from tests.support.models import MLP, TOKENS, bert, gpt2, images, llama, pixels, texts, tokens, vectors, vit

NARROW = {"vocab_size": TOKENS, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def opt():
    config = OPTConfig(**NARROW, ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=16)
    return OPTForCausalLM(config)


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=TOKENS, decoder_start_token_id=0, **sizes))


def bart():
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
    return BartForConditionalGeneration(BartConfig(vocab_size=TOKENS, **sizes, **heads))


def gemma():
    """Layers that look far and layers that look near are given different masks."""
    sizes = {"num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 24, "sliding_window": 4}
    return Gemma3ForCausalLM(Gemma3TextConfig(**NARROW | {"num_hidden_layers": 7}, **sizes))


def albert():
    return AlbertForSequenceClassification(AlbertConfig(**NARROW, embedding_size=8, intermediate_size=24, num_labels=4))


def pairs():
    """Inputs and answers as long as one another, each with padding of its own."""
    g = torch.Generator().manual_seed(0)
    inputs, labels = (torch.randint(3, TOKENS, (3, 8), generator=g) for _ in range(2))
    mask = torch.ones_like(inputs)
    mask[0, 5:] = 0
    labels[1:, 4:] = -100
    return {"input_ids": inputs, "attention_mask": mask, "labels": labels}


class Skips(nn.Module):
    """A list whose third member also takes what the first one gave, changed on the way."""

    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleList([Step() for _ in range(3)])
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        one = self.steps[0](x, x)
        two = self.steps[1](one, x)
        return self.head(self.steps[2](two, one * 2))


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.down = nn.Linear(8, 8)

    def forward(self, x, other):
        return x + self.down((self.up(x) + other).relu())


def convnext():
    return timm.create_model("convnext_atto", depths=(2, 2, 3, 2), dims=(8, 8, 16, 16), num_classes=4)


def resnet():
    return timm.create_model("resnet18", channels=[8, 8, 12, 12], stem_width=8, num_classes=4)


CASES = {
    "bert": (bert, texts, {"bert.encoder.layer": 2}),
    "gpt2": (gpt2, tokens, {"transformer.h": 2}),
    "llama": (llama, tokens, {"model.layers": 2}),
    "opt": (opt, tokens, {"model.decoder.layers": 3}),
    "gemma": (gemma, tokens, {"model.layers": 7}),
    "t5": (t5, pairs, {"encoder.block": 3, "decoder.block": 3}),
    "bart": (bart, pairs, {"model.encoder.layers": 2, "model.decoder.layers": 2}),
    "vit": (vit, pixels, {"vit.layers": 2}),
    "convnext": (convnext, lambda: images(size=32), {"stages": 4}),
    "resnet": (resnet, lambda: images(size=32), {"layer1": 2, "layer2": 2, "layer3": 2, "layer4": 2}),
    "albert": (albert, texts, {}),
    "mlp": (MLP, vectors, {}),
    "skips": (Skips, vectors, {}),
}


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    build, batch, expected = CASES[request.param]
    return build().eval(), batch(), expected


def owners(model):
    kinds = (nn.Linear, nn.Conv2d, type(gpt2().transformer.h[0].attn.c_attn))
    return {module for module in model.modules() if isinstance(module, kinds)}


def test_the_list_of_blocks_is_found(case):
    model, batch, expected = case
    with still(model):
        found = find_stacks(model, owners(model), batch, forward_of(None))
    assert {stack.path: len(stack.blocks) for stack in found} == expected


def test_blocks_run_one_at_a_time_give_what_the_model_gives(case):
    model, batch, _ = case
    with still(model):
        for stack in find_stacks(model, owners(model), batch, forward_of(None)):
            last = list(stack.blocks.values())[-1]
            given = []
            handle = last.register_forward_hook(lambda _, args, output, given=given: given.append(output))
            forward_of(None)(model, batch)
            handle.remove()
            for offload in (False, True):
                replay = Replay(model, stack, [batch], forward_of(None), offload)
                for number in range(len(stack.blocks) - 1):
                    replay.advance(number)
                output = replay.run(len(stack.blocks) - 1, 0)
                one, two = (value if isinstance(value, torch.Tensor) else value[0] for value in (output, given[0]))
                assert torch.equal(one, two)


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_every_model_is_pruned_exactly(case, criterion):
    model, batch, _ = case
    report = hfprune.prune(model, PruningConfig(criterion=criterion, target=0.5), batch)
    assert report.masks.zeros == round(0.5 * report.units)


@pytest.mark.parametrize("build", [t5, bart])
def test_padding_of_both_sides_counts_nowhere(build):
    digests = []
    for filler in (1, 9):
        torch.manual_seed(0)
        model, batch = build(), pairs()
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, filler)
        shifted = batch["labels"].masked_fill(batch["labels"] == -100, filler).roll(1, 1)
        shifted[:, 0] = 0
        mask = torch.ones_like(shifted)
        mask[1:, 5:] = 0
        given = batch | {"decoder_input_ids": shifted, "decoder_attention_mask": mask}
        digests.append(hfprune.prune(model, PruningConfig(criterion="wanda", target=0.5), given).masks.digest())
    assert digests[0] == digests[1]


def test_what_the_first_block_takes_is_let_go():
    torch.manual_seed(0)
    model = llama(4).eval()
    with still(model):
        (stack,) = find_stacks(model, owners(model), tokens(), forward_of(None))
        replay = Replay(model, stack, [tokens(seed=s) for s in range(3)], forward_of(None))
        for number in range(3):
            replay.advance(number)
            assert all(len(held) == 1 for held in replay.results)  # the hidden state alone
            assert all(call is None for calls in replay.calls for call in calls[: number + 1])
