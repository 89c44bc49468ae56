"""What loggers are told: one run, with every step's target, sparsity and metrics, and every layer's."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import TensorBoardCallback

from tests.training.setup import make_trainer


class Recorder(TensorBoardCallback):
    """A logger that keeps what it is told."""

    def __init__(self):
        super().__init__()
        self.events = []

    def on_train_begin(self, *args, **kwargs):
        self.events.append("begin")

    def on_train_end(self, *args, **kwargs):
        self.events.append("end")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.events.append((state.global_step, dict(logs)))


def test_tensorboard_shows_every_step(tmp_path):
    trainer = make_trainer(tmp_path, report_to="tensorboard")
    trainer.train()
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(list(folder.iterdir())) == 1  # one run, not one a phase
    found = EventAccumulator(str(folder)).Reload()
    values = {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}
    assert values["train/phase"] == [(0, 1.0), (8, 2.0)]
    assert values["train/target_sparsity"] == [(0, pytest.approx(0.4)), (8, pytest.approx(0.8))]
    assert values["train/sparsity"] == [(0, pytest.approx(0.4, abs=1e-4)), (8, pytest.approx(0.8, abs=1e-4))]
    layers = {name: value for name, value in values.items() if name.startswith("train/sparsity/")}
    assert set(layers) == {f"train/sparsity/{name}" for name in trainer.masks}
    last = {name: record.zeros / record.numel for name, record in trainer.masks.sparsity().items()}
    assert {name: series[-1][1] for name, series in layers.items()} == {
        f"train/sparsity/{name}": pytest.approx(value) for name, value in last.items()
    }
    assert [step for step, _ in values["train/accuracy_before"]] == [8, 16]
    assert [step for step, _ in values["train/accuracy_after"]] == [8, 16]
    assert values["train/accuracy_before"][0][1] == pytest.approx(trainer.steps[0].metric_before["accuracy"])
    assert values["train/accuracy_after"][-1] == (16, pytest.approx(trainer.steps[-1].metric["accuracy"]))


@pytest.mark.parametrize("phases", ["trained", "not trained"])
def test_a_logger_sees_one_run(tmp_path, phases):
    logger = Recorder()
    trainer = make_trainer(
        tmp_path,
        callbacks=[logger],
        num_train_epochs=1,
        **({} if phases == "trained" else {"pruning": {"recovery": {"steps": 0}}}),
    )
    trainer.train()
    assert [event for event in logger.events if isinstance(event, str)] == ["begin", "end"]
    assert logger.events[0] == "begin" and logger.events[-1] == "end"


def test_removals_say_what_is_gone_of_every_group(tmp_path):
    logger = Recorder()
    pruning = {"granularity": "neuron", "target": {"ratio": 0.5}, "round_to": 1, "schedule": {"kind": "one_shot"}}
    trainer = make_trainer(tmp_path, callbacks=[logger], pruning=pruning)
    trainer.train()
    (gone,) = [logs for _, logs in logger.events[1:-1] if any(name.startswith("removed/") for name in logs)]
    groups = trainer.method.report()["removed"]["groups"]
    assert gone == {f"removed/{name}": pytest.approx(1 - g["kept"] / g["units"]) for name, g in groups.items()}
