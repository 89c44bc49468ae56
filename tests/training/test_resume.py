"""Interruption and resumption: the same masks, weights and metric as a run that was not interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch
from transformers import TrainerCallback

from hfprune.checkpoint.metadata import block_of
from hfprune.errors import CheckpointError
from hfprune.training.checkpoints.folder import last_checkpoint
from tests.training.setup import Digits, PlainNet, make_trainer, tiny_vit

RUNS = {
    "phases": {"schedule": {"kind": "hybrid", "steps": 1}, "recovery": {"epochs": 2, "patience": 1}},
    "gradual": {"schedule": {"kind": "cubic", "steps": 3, "every": 3}, "recovery": {"epochs": 4}},
    "movement": {"criterion": "movement", "recovery": {"steps": 6}},
    "taylor blocks": {"criterion": "taylor", "granularity": "block:2x2", "scope": "layer"},
}


class StopAt(TrainerCallback):
    """A signal that arrives at an optimizer step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class StopAtSave(TrainerCallback):
    """A kill right after a checkpoint has been written, the `nth`."""

    def __init__(self, nth: int):
        self.left = nth

    def on_save(self, *_, **__):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


class SigtermAt(TrainerCallback):
    """A scheduler that wants the machine back."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def outcome(trainer) -> tuple:
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    steps = [(step.achieved, step.metric, step.epochs) for step in trainer.steps]
    return trainer.masks.digest(), weights, steps, block_of(trainer.model)


def assert_same(found: tuple, expected: tuple) -> None:
    assert found[0] == expected[0]
    assert found[2:] == expected[2:]
    assert all(torch.equal(value, expected[1][name]) for name, value in found[1].items())


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, name):
    options = {"pruning": RUNS[name], "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    expected, length = outcome(whole), whole.state.global_step
    for step in (4, 8, length - 1):
        folder = tmp_path / f"stopped-{step}"
        stopped = make_trainer(folder, **options, callbacks=[StopAt(step)])
        with pytest.raises(KeyboardInterrupt):
            stopped.train()
        resumed = make_trainer(folder, **options)
        resumed.train(resume_from_checkpoint=True)
        assert_same(outcome(resumed), expected)
        assert resumed.state.global_step == length
        steps = [entry["step"] for entry in resumed.state.log_history if "loss" in entry]
        assert steps == [entry["step"] for entry in whole.state.log_history if "loss" in entry]


@pytest.mark.parametrize("nth", [1, 2])
def test_a_kill_after_the_last_checkpoint_of_a_phase_trains_no_longer(tmp_path, nth):
    options = {"pruning": {"recovery": {"epochs": 3, "patience": 1}}, "learning_rate": 1e-9}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    assert [step.epochs for step in whole.steps] == [1.0, 1.0]
    stopped = make_trainer(tmp_path / "stopped", **options, callbacks=[StopAtSave(nth)])
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = make_trainer(tmp_path / "stopped", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(outcome(resumed), outcome(whole))


@pytest.mark.parametrize("step", [2, 4, 13])
def test_sigterm_leaves_a_checkpoint_of_that_step(tmp_path, step):
    options = {"enable_jit_checkpoint": True, "save_strategy": "no"}
    whole = make_trainer(tmp_path / "whole", **options)
    handler = signal.getsignal(signal.SIGTERM)
    whole.train()
    stopped = make_trainer(tmp_path / "stopped", **options, callbacks=[SigtermAt(step)])
    with pytest.raises(SystemExit) as raised:
        stopped.train()
    assert raised.value.code == 143
    assert last_checkpoint(tmp_path / "stopped").name == f"checkpoint-{step + 1}"
    assert signal.getsignal(signal.SIGTERM) == handler
    resumed = make_trainer(tmp_path / "stopped", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(outcome(resumed), outcome(whole))


def test_another_number_of_examples_a_step_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, callbacks=[StopAt(5)]).train()
    other = make_trainer(tmp_path, per_device_train_batch_size=16)
    said = r"made by 1 processes with 32 examples an optimizer step; 1 with 16 .*per_device_train_batch_size=32"
    with pytest.raises(CheckpointError, match=said):
        other.train(resume_from_checkpoint=True)
    same = make_trainer(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=4)
    same.train(resume_from_checkpoint=True)
    assert same.achieved == pytest.approx(0.8, abs=1e-3)


def test_every_checkpoint_resumes_to_the_same_end(tmp_path):
    whole = make_trainer(tmp_path / "whole", save_strategy="steps", save_steps=3)
    whole.train()
    for checkpoint in (tmp_path / "whole").glob("checkpoint-*"):
        resumed = make_trainer(tmp_path / "again", save_strategy="steps", save_steps=3)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert_same(outcome(resumed), outcome(whole))


def test_a_plain_module_resumes(tmp_path):
    def trainer(folder, **more):
        torch.manual_seed(0)
        return make_trainer(folder, PlainNet(), **more)

    whole = trainer(tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "stopped", callbacks=[StopAt(13)]).train()
    resumed = trainer(tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=True)
    assert_same(outcome(resumed), outcome(whole))


def test_augmented_images_resume_in_the_middle_of_an_epoch(tmp_path):
    from hfprune.data.images import ImageRows, ImageShape, collate_images

    digits = Digits(0, 128)

    def trainer(folder, **more):
        shape = ImageShape(size=(8, 8), channels=1, mean=[0.0], std=[1.0])
        rows = ImageRows(lambda i: digits.images[i], digits.labels.tolist(), shape, augment=True)
        made = make_trainer(folder, train_dataset=rows, save_strategy="steps", save_steps=3, **more)
        made.data_collator = collate_images
        return made

    whole = trainer(tmp_path / "whole")
    whole.train()
    for step in (4, 11):
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path / str(step), callbacks=[StopAt(step)]).train()
        resumed = trainer(tmp_path / str(step))
        resumed.train(resume_from_checkpoint=True)
        assert_same(outcome(resumed), outcome(whole))


def test_an_ended_run_resumes_to_its_end_without_training(tmp_path):
    whole = make_trainer(tmp_path)
    whole.train()
    again = make_trainer(tmp_path)
    assert again.train(resume_from_checkpoint=True).global_step == whole.state.global_step
    assert_same(outcome(again), outcome(whole))


def test_what_a_killed_process_left_is_passed_over(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    good = last_checkpoint(tmp_path)
    half = tmp_path / "checkpoint-999"
    shutil.copytree(good, half)
    weights = half / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / ".writing-checkpoint-1000").mkdir()
    assert last_checkpoint(tmp_path) == good
    assert not (tmp_path / ".writing-checkpoint-1000").exists()


def test_a_kill_between_two_renames_loses_nothing(tmp_path):
    make_trainer(tmp_path).train()
    good = last_checkpoint(tmp_path)
    good.rename(good.with_name(f".replaced-{good.name}"))
    assert last_checkpoint(tmp_path) == good


def test_one_process_sets_right_and_the_others_wait_for_it(tmp_path, monkeypatch):
    make_trainer(tmp_path).train()
    good = last_checkpoint(tmp_path)
    aside = good.with_name(f".replaced-{good.name}")
    good.rename(aside)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: aside.rename(good))
    assert last_checkpoint(tmp_path) == good


def test_checkpoints_have_the_mode_of_new_files(tmp_path):
    make_trainer(tmp_path).train()
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in last_checkpoint(tmp_path).iterdir()}
    assert modes == {(tmp_path / "new").stat().st_mode}


def test_another_configuration_is_refused_by_its_key(tmp_path):
    make_trainer(tmp_path).train()
    with pytest.raises(CheckpointError, match=r"pruning.target: .*\"ratio\": 0.8.*begin anew without --resume"):
        make_trainer(tmp_path, pruning={"target": 0.7}).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("pruning", [{}, {"granularity": "channel", "round_to": 1, "target": {"ratio": 0.5}}])
def test_another_model_is_refused(tmp_path, pruning):
    make_trainer(tmp_path, PlainNet(16), pruning=pruning).train()
    for other in (PlainNet(12), tiny_vit()):
        with pytest.raises(CheckpointError, match=r"made of another model .PlainNet., or of this one in other sizes"):
            make_trainer(tmp_path, other, pruning=pruning).train(resume_from_checkpoint=True)


def test_masks_that_were_tampered_with_are_refused(tmp_path):
    make_trainer(tmp_path).train()
    path = last_checkpoint(tmp_path) / "pruning_state.json"
    state = json.loads(path.read_text())
    state["digest"] = "0" * 64
    path.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="the masks do not match their recorded hash"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_newer_format_is_refused(tmp_path):
    make_trainer(tmp_path).train()
    path = last_checkpoint(tmp_path) / "pruning_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="newer version in format 99"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_an_ordinary_checkpoint_is_not_one_of_a_pruning_run(tmp_path):
    make_trainer(tmp_path).train()
    (last_checkpoint(tmp_path) / "pruning_state.json").unlink()
    with pytest.raises(CheckpointError, match="is not a checkpoint of a pruning run"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_failed_write_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    save, saved = torch.save, []

    def full(value, path, *args, **kwargs):
        saved.append(path)
        if len(saved) > 4:
            raise OSError(28, "No space left on device")
        return save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        CheckpointError, match=r"could not be written .*No space left.*the last good one is '.*checkpoint-4'"
    ):
        trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4"]


def test_retention_never_takes_the_only_whole_one(tmp_path):
    make_trainer(tmp_path / "other").train()
    shutil.copytree(last_checkpoint(tmp_path / "other"), tmp_path / "run" / "checkpoint-999")
    (tmp_path / "run" / "checkpoint-999" / "model.safetensors").write_bytes(b"half")
    trainer = make_trainer(tmp_path / "run", save_total_limit=1)
    trainer.train()
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-16"


def test_what_can_not_be_read_back_takes_nobodys_place(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, save_total_limit=1)

    def broken(self, folder):
        if self.state.global_step == 8:
            (folder / "pruning_state.json").write_text('{"half')

    monkeypatch.setattr(type(trainer), "save_extra", broken)
    with pytest.raises(CheckpointError, match="checkpoint-8 could not be written .*can't be read back.*checkpoint-4"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_retention_keeps_the_newest(tmp_path):
    trainer = make_trainer(tmp_path, save_total_limit=1)
    trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-16"]
