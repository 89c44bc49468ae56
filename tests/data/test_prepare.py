"""Data in the shape that models take: images, texts, blocks; and that Trainer trains on each."""

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hfprune.data import images, open_data, prepare
from hfprune.errors import ConfigError, DataError
from hfprune.metrics import metrics_for
from hfprune.models import load_model
from hfprune.recipe import DataSection, ModelSection

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
VIT = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 2}


def digits(**section):
    return open_data(DataSection(name="digits", **section), 0)


def tiny_vit(**args):
    section = ModelSection(name="timm/vit_tiny_patch16_224", pretrained=False, args=VIT | args)
    return load_model(section, "image-classification", [str(i) for i in range(10)]).model


def tokenizer():
    words = ["[UNK]", "[PAD]", "[EOS]", *(f"w{i}" for i in range(20))]
    built = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[EOS]"}
    return PreTrainedTokenizerFast(tokenizer_object=built, **special)


def write_texts(path, count=12):
    rows = [f"{' '.join(f'w{(i + j) % 20}' for j in range(1 + i % 5))},{i % 2}" for i in range(count)]
    path.write_text("\n".join(["text,label", *rows]) + "\n")


def test_digits_for_a_model_of_their_own_size():
    data = prepare(digits(augment=False), tiny_vit(), None, 0)
    batch = data.collator([data.train[i] for i in range(5)])
    assert batch["pixel_values"].shape == (5, 1, 8, 8)
    assert batch["labels"].dtype == torch.int64
    pixels = torch.tensor(np.array(digits().train["image"][:5]), dtype=torch.float32)
    assert torch.allclose(batch["pixel_values"][:, 0], (pixels - 0.5) / 0.5)
    assert data.facts == {"image_size": [8, 8], "channels": 1, "mean": [0.5], "std": [0.5]}


def test_digits_for_a_larger_model_with_three_channels():
    model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=10, **SIZES))
    data = prepare(digits(), model, None, 0)
    pixels = data.example(4)["pixel_values"]
    assert pixels.shape == (4, 3, 16, 16)
    assert torch.equal(pixels[:, 0], pixels[:, 2])
    assert model(pixels).logits.shape == (4, 10)


def test_an_own_module_is_given_what_its_first_convolution_takes():
    grey = prepare(digits(), nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), None, 0)
    assert grey.example(1)["pixel_values"].shape == (1, 1, 8, 8)
    colour = prepare(digits(), nn.Sequential(nn.Conv2d(3, 4, 3)), None, 0)
    assert colour.example(1)["pixel_values"].shape == (1, 3, 8, 8)


def test_random_shifts_follow_seed_and_epoch_and_spare_the_evaluation():
    first, second = (prepare(digits(), tiny_vit(), None, seed) for seed in (0, 1))

    def drawn(rows, epoch):
        rows.set_epoch(epoch)
        state = torch.get_rng_state()
        batch = torch.stack([row["pixel_values"] for row in rows.__getitems__(list(range(32)))])
        assert torch.equal(torch.get_rng_state(), state)
        return batch

    assert torch.equal(drawn(first.train, 0), drawn(first.train, 0))
    assert not torch.equal(drawn(first.train, 0), drawn(first.train, 1))
    assert not torch.equal(drawn(first.train, 0), drawn(second.train, 0))
    assert torch.equal(drawn(first.evaluation, 0), drawn(second.evaluation, 1))


def test_a_shift_moves_whole_images_over_black():
    generator = torch.Generator().manual_seed(0)
    batch = torch.zeros(64, 2, 8, 8)
    batch[:, 0, 4, 2] = 1
    batch[:, 1, 4, 2] = 2
    moved = images.shift(batch, mirror=False, generator=generator)
    places = moved[:, 0].flatten(1).argmax(1)
    assert torch.equal(moved[:, 1], 2 * moved[:, 0])
    assert moved.sum() == batch.sum()
    assert {(int(p) // 8, int(p) % 8) for p in places} == {(y, x) for y in (3, 4, 5) for x in (1, 2, 3)}
    mirrored = images.shift(batch, mirror=True, generator=generator)[:, 0].flatten(1).argmax(1) % 8
    assert {int(x) for x in mirrored} == {1, 2, 3, 4, 5, 6}


def test_digits_are_never_mirrored_but_other_images_are(tmp_path):
    write_pictures(tmp_path)
    model = tiny_vit(in_chans=3)
    assert not prepare(digits(), tiny_vit(), None, 0).train.mirror
    data = prepare(open_data(DataSection(name=str(tmp_path)), 0), model, None, 0)
    assert data.train.mirror
    assert data.train.augment
    assert not data.evaluation.augment


def write_pictures(root, size=(12, 8)):
    for number, name in enumerate(["black", "white"]):
        (root / name).mkdir()
        for index in range(5):
            Image.fromarray(np.full((*size, 3), 255 * number, dtype=np.uint8)).save(root / name / f"{index}.png")


def test_pictures_kept_in_memory_and_decoded_each_time_are_the_same(tmp_path, monkeypatch):
    write_pictures(tmp_path)
    raw = open_data(DataSection(name=str(tmp_path), mean=[0.0], std=[1.0], augment=False), 0)
    kept = prepare(raw, tiny_vit(), None, 0)
    monkeypatch.setattr(images, "KEPT_BYTES", 0)
    decoded = prepare(raw, tiny_vit(), None, 0)
    for index in range(len(raw.train)):
        row, other = kept.train[index], decoded.train[index]
        assert row["pixel_values"].shape == (1, 8, 8)
        assert torch.equal(row["pixel_values"], other["pixel_values"])
        assert row["labels"] == other["labels"] == int(row["pixel_values"].mean())


def test_a_picture_that_is_broken_is_named(tmp_path):
    write_pictures(tmp_path)
    (tmp_path / "black" / "0.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match="holds an image that can't be read"):
        prepare(open_data(DataSection(name=str(tmp_path)), 0), tiny_vit(), None, 0)


def test_the_saved_model_says_how_images_were_prepared(tmp_path):
    model = tiny_vit()
    data = prepare(digits(mean=[0.3], std=[0.2]), model, None, 0)
    model.save_pretrained(tmp_path)
    config = AutoModelForImageClassification.from_pretrained(tmp_path).config.pretrained_cfg
    assert (config["mean"], config["std"]) == ([0.3], [0.2])
    assert config["input_size"] == [1, 8, 8]
    assert data.facts["mean"] == [0.3]


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ({"image_size": 16}, r"data\.image_size: 16, but the model takes 8x8; --set model\.args\.img_size=16"),
        ({"mean": [0.1, 0.2]}, r"data\.mean: \[0\.1, 0\.2\], but the model takes 1 channels"),
        ({"std": [0.0]}, r"data\.std: \[0\.0\].*above 0"),
    ],
)
def test_what_the_model_cannot_take_is_refused(section, line):
    with pytest.raises(ConfigError, match=line):
        prepare(digits(**section), tiny_vit(), None, 0)


def test_texts_are_truncated_and_padded_to_the_longest_of_their_batch(tmp_path):
    write_texts(tmp_path / "all.csv")
    raw = open_data(DataSection(name=str(tmp_path / "all.csv"), task="text-classification", max_length=3), 0)
    data = prepare(raw, nn.Identity(), tokenizer(), 0)
    rows = [data.train[i] for i in range(len(data.train))]
    lengths = [len(row["input_ids"]) for row in rows]
    assert (min(lengths), max(lengths)) == (1, 3)
    batch = data.collator(rows)
    assert batch["input_ids"].shape == (len(rows), 3)
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert set(data.example(2)) == {"input_ids", "attention_mask"}


def test_pairs_go_in_together(tmp_path):
    (tmp_path / "all.csv").write_text("sentence1,sentence2,label\n" + "w1,w2 w3,0\nw4,w5,1\n" * 5)
    raw = open_data(DataSection(name=str(tmp_path / "all.csv"), task="text-classification"), 0)
    data = prepare(raw, nn.Identity(), tokenizer(), 0)
    assert {tuple(row["input_ids"]) for row in data.train} == {(4, 5, 6), (7, 8)}


def test_a_running_text_is_cut_into_blocks_in_its_order(tmp_path):
    (tmp_path / "train.txt").write_text("".join(f"w{i} w{i + 1}\n" for i in range(0, 18, 2)))
    (tmp_path / "test.txt").write_text("w0 w1 w2\nw3 w4\n")
    raw = open_data(DataSection(name=str(tmp_path), task="causal-lm", block_size=4), 0)
    data = prepare(raw, nn.Identity(), tokenizer(), 0)
    assert [row["input_ids"] for row in data.train] == [[3 + i + j for j in range(4)] for i in range(0, 16, 4)]
    assert len(data.evaluation) == 1
    assert data.train[0]["labels"] == data.train[0]["input_ids"]
    assert set(data.example(3)) == {"input_ids"}
    assert data.example(3)["input_ids"].shape == (3, 4)


def test_documents_are_parted_by_the_end_of_text(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("text\nw0 w1\nw2\n")
    raw = open_data(DataSection(name=str(tmp_path), task="causal-lm", block_size=5), 0)
    data = prepare(raw, nn.Identity(), tokenizer(), 0)
    assert data.train[0]["input_ids"] == [3, 4, 2, 5, 2]


def test_a_text_shorter_than_a_block_is_refused(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text("w0 w1\nw2\n")
    raw = open_data(DataSection(name=str(tmp_path), task="causal-lm", block_size=100), 0)
    with pytest.raises(DataError, match=r"data\.block_size: 100 tokens a block, but the training text"):
        prepare(raw, nn.Identity(), tokenizer(), 0)


def test_text_needs_a_tokenizer(tmp_path):
    write_texts(tmp_path / "all.csv")
    raw = open_data(DataSection(name=str(tmp_path / "all.csv"), task="text-classification"), 0)
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        prepare(raw, nn.Identity(), None, 0)


@pytest.mark.parametrize("task", ["image-classification", "text-classification", "causal-lm"])
def test_trainer_trains_and_measures(task, tmp_path):
    torch.manual_seed(0)
    words = tokenizer()
    if task == "image-classification":
        model, words = tiny_vit(), None
        raw = digits(train_samples=64, eval_samples=32)
    else:
        write_texts(tmp_path / "all.csv", count=40)
        section = DataSection(name=str(tmp_path / "all.csv"), task=task, block_size=8)
        raw = open_data(section, 0)
        if task == "causal-lm":
            model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **SIZES))
        else:
            model = BertForSequenceClassification(BertConfig(vocab_size=len(words), **SIZES))
    data = prepare(raw, model, words, 0)
    bundle = metrics_for(None, task)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path / "out"), max_steps=3, use_cpu=True, report_to=[], save_strategy="no", seed=0
        ),
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        data_collator=data.collator,
        compute_metrics=bundle.compute,
        preprocess_logits_for_metrics=bundle.preprocess_logits,
    )
    trainer.train()
    result = trainer.evaluate()
    assert f"eval_{bundle.main}" in result
    if task == "causal-lm":
        assert result["eval_perplexity"] == pytest.approx(np.exp(result["eval_loss"]), rel=1e-3)
    else:
        assert 0 <= result["eval_accuracy"] <= 1
