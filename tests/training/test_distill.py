"""Distillation: the loss, its scale under accumulation, and a teacher that stays what it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, BertForSequenceClassification

from hfprune.errors import CheckpointError, ConfigError
from hfprune.training.distill import divergences
from tests.support.models import bert, llama
from tests.support.processes import run_script
from tests.training.setup import Digits, PlainNet, make_trainer, tiny_vit
from tests.training.test_resume import StopAt, assert_same, outcome

DISTILL = {
    "schedule": "one_shot",
    "target": 0.5,
    "recovery": {"steps": 4, "distill": {"temperature": 3, "alpha": 0.75}},
}


def plain() -> nn.Module:
    torch.manual_seed(0)
    return PlainNet()


def test_the_divergence_is_the_kullback_leiblers():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7)
    found = divergences(student, teacher, 2.0, torch.tensor([0, 1, -100, 2, 3]), shift=False)
    expected = nn.functional.kl_div(
        (student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert torch.allclose(found, expected[[0, 1, 3, 4]])
    assert divergences(student, student, 2.0, None, shift=False).abs().max() < 1e-6


def test_places_count_that_predict_something():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1, 4, 7)
    labels = torch.tensor([[5, 1, 2, -100]])
    assert len(divergences(student, teacher, 1.0, labels, shift=False)) == 3
    shifted = divergences(student, teacher, 1.0, labels, shift=True)
    rows = divergences(student, teacher, 1.0, None, shift=False)
    assert torch.allclose(shifted, rows[:2])  # the third place would predict what is left out, the last one nothing


def test_maps_have_their_classes_in_the_second_dimension():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 7, 3, 4)
    labels = torch.randint(7, (2, 3, 4))
    found = divergences(student, teacher, 1.0, labels, shift=False)
    expected = divergences(student.movedim(1, -1), teacher.movedim(1, -1), 1.0, labels, shift=False)
    assert found.shape == (24,) and torch.equal(found, expected)


@pytest.mark.parametrize("build", [lambda: tiny_vit(dropout=0.0), plain], ids=["vit", "own"])
def test_the_loss_is_made_of_both(tmp_path, build):
    trainer = make_trainer(tmp_path, build(), pruning=DISTILL)
    trainer.begin_teaching(trainer.pruning.recovery.distill)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.1)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    both, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    teacher, trainer.teacher = trainer.teacher, None
    task = trainer.compute_loss(trainer.model, dict(batch))
    inputs = batch["pixel_values"]
    taught = teacher.model(inputs)
    taught = taught if isinstance(taught, torch.Tensor) else taught.logits
    distance = divergences(outputs["logits"], taught, 3.0, batch["labels"], shift=False).mean()
    assert both.item() == pytest.approx((0.25 * task + 0.75 * 9 * distance).item(), rel=1e-5)
    # Evaluation measures what the labels say.
    trainer.teacher = teacher
    assert trainer.evaluate()["eval_loss"] == pytest.approx(_loss_without(trainer), rel=1e-6)


def _loss_without(trainer) -> float:
    trainer.teacher = None
    return trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize(
    "build", [lambda: tiny_vit(dropout=0.0), lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))]
)
def test_accumulated_batches_are_one_large_one(tmp_path, build):
    found = []
    for batch, accumulated in ((32, 1), (8, 4)):
        torch.manual_seed(0)
        trainer = make_trainer(
            tmp_path / str(batch), build(), optim="sgd", learning_rate=0.1, max_grad_norm=0.0,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated, save_strategy="no",
            pruning=DISTILL | {"recovery": {"steps": 2, "distill": {"alpha": 1.0}, "restore_best": False}},
            train_dataset=Digits(0, 64),
        )  # fmt: skip
        trainer.train()
        found.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    "more",
    [{}, {"granularity": ["head", "neuron"], "target": {"macs": 0.6}, "round_to": 1}, {"criterion": "taylor"}],
    ids=["masks", "removal", "taylor"],
)
def test_the_teacher_stays_dense(tmp_path, more):
    model = tiny_vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(tmp_path, model, pruning=DISTILL | more)
    trainer.train()
    teacher = trainer.teacher.model
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())
    assert trainer.achieved > 0.3


def test_a_language_model_is_taught_where_it_predicts(tmp_path):
    torch.manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(32, (32, 10))]
    trainer = make_trainer(tmp_path, llama(), pruning=DISTILL, train_dataset=rows, eval_dataset=rows[:8])
    trainer.compute_metrics = None
    trainer.train()
    assert trainer.steps[-1].metric["loss"] > 0


def test_it_resumes_with_the_same_teacher(tmp_path):
    options = {"pruning": DISTILL, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "stopped", **options, callbacks=[StopAt(3)]).train()
    resumed = make_trainer(tmp_path / "stopped", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(outcome(resumed), outcome(whole))


def test_another_teacher_is_refused(tmp_path):
    make_trainer(tmp_path, pruning=DISTILL).train()
    other = tiny_vit()
    torch.nn.init.normal_(other.classifier.weight)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match="made with another teacher; resume with a new trainer around the dense"):
        make_trainer(tmp_path, other, pruning=DISTILL).train(resume_from_checkpoint=True)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_regression_is_refused_before_anything_is_pruned(tmp_path):
    model = BertForSequenceClassification(AutoConfig.for_model(**bert().config.to_dict() | {"num_labels": 1}))
    rows = [{"input_ids": torch.arange(6), "labels": 0.5} for _ in range(8)]
    trainer = make_trainer(tmp_path, model, pruning=DISTILL, train_dataset=rows, eval_dataset=rows)
    with pytest.raises(ConfigError, match=r"pruning.recovery.distill: compares class probabilities"):
        trainer.train()
    assert not len(trainer.masks) and not trainer.steps


SCRIPT = """
import sys
from pathlib import Path
import torch, torch.distributed as dist
from tests.training.setup import make_trainer, tiny_vit

folder, processes = Path(sys.argv[1]), int(sys.argv[2])
trainer = make_trainer(
    folder, tiny_vit(dropout=0.0), per_device_train_batch_size=32 // processes, learning_rate=1e-2, optim="sgd",
    pruning={"recovery": {"epochs": 1, "distill": {"alpha": 0.9}}},
)
assert trainer.args.world_size == processes
trainer.train()
trainer.save_model(str(folder / "saved"))
"""


def test_two_processes_are_taught_as_one(tmp_path):
    from safetensors.torch import load_file

    found = []
    for processes in (1, 2):
        folder = tmp_path / f"run-{processes}"
        run_script(tmp_path / "distill.py", SCRIPT, folder, processes, processes=processes)
        found.append(load_file(folder / "saved" / "model.safetensors"))
    close = [torch.isclose(value, found[1][name], atol=1e-4).float().mean() for name, value in found[0].items()]
    assert min(close) > 0.99
