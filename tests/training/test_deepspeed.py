"""DeepSpeed's stages on CPUs, where it is installed: the masks and weights of one process, and resume."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hfprune.checkpoint import read_block, verify
from tests.support.processes import ROOT, run_script

APART = Path(sys.prefix) / "apart" / "deepspeed"
"""Where scripts/test.sh puts it: in the environment itself accelerate would import it into every process."""

pytestmark = pytest.mark.skipif(
    not APART.is_dir() and importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


@pytest.fixture(autouse=True)
def _found_on_the_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(APART))


CONFIGS = ROOT / "recipes" / "accelerate"

SCRIPT = """
import sys
from pathlib import Path
import torch.distributed as dist, transformers
from hfprune.errors import ConfigError
from tests.training.setup import make_trainer, tiny_vit

transformers.utils.logging.disable_progress_bar()
folder, processes = Path(sys.argv[1]), int(sys.argv[2])

def trainer(name, **options):
    pruning = {"criterion": "snip", "recovery": {"epochs": 2, "restore_best": False}} | options.pop("pruning", {})
    return make_trainer(
        folder / name, tiny_vit(dropout=0.0), per_device_train_batch_size=32 // processes, learning_rate=1e-3,
        per_device_eval_batch_size=100 // processes, pruning=pruning, **options)

class Interrupted(Exception):
    pass

class Interrupt(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 7:
            raise Interrupted

whole = trainer("whole")
assert whole.args.world_size == processes
whole.train()
whole.save_model(str(folder / "saved"))
if processes > 1:
    digests = [None] * processes
    dist.all_gather_object(digests, whole.masks.digest())
    assert len(set(digests)) == 1
    try:
        trainer("halted", callbacks=[Interrupt()]).train()
        raise AssertionError
    except Interrupted:
        pass
    again = trainer("halted")
    again.train(resume_from_checkpoint=True)
    again.save_model(str(folder / "resumed"))
    for words, pruning in (
        ("'movement'", {"criterion": "movement"}),
        ("rank looks at whole tensors", {"granularity": "rank", "criterion": "whitening"}),
        ("ice looks at whole tensors", {"granularity": "neuron", "target": 0.5, "strategy": "ice", "schedule": {}}),
    ):
        try:
            trainer("refused", pruning=pruning)
            raise AssertionError
        except ConfigError as error:
            assert words in str(error), error
"""


@pytest.mark.parametrize("stage", [1, 2])
def test_two_processes_of_zero_prune_like_one_and_resume(tmp_path, stage):
    config = CONFIGS / f"deepspeed_zero{stage}.yaml"
    for processes in (1, 2):
        run_script(
            tmp_path / "train.py",
            SCRIPT,
            tmp_path / str(processes),
            processes,
            processes=processes,
            config=config if processes > 1 else None,
        )
    assert not verify(tmp_path / "2" / "saved").problems
    one, two, resumed = (
        load_file(tmp_path / name / "model.safetensors") for name in ("1/saved", "2/saved", "2/resumed")
    )
    zeros = [sum(int((tensors[name] == 0).sum()) for name in one) for tensors in (one, two)]
    assert zeros[0] == zeros[1]
    assert sum(int(((two[name] == 0) != (value == 0)).sum()) for name, value in one.items()) <= 1e-3 * zeros[0]
    for name, value in two.items():
        torch.testing.assert_close(resumed[name], value, atol=1e-6, rtol=0)
        torch.testing.assert_close(one[name], value, atol=3e-3, rtol=0)


REMOVAL = """
import sys
from pathlib import Path
import torch, torch.distributed as dist, transformers
from tests.training.setup import make_trainer, tiny_vit

transformers.utils.logging.disable_progress_bar()
folder, processes = Path(sys.argv[1]), int(sys.argv[2])

def trainer(name, **options):
    return make_trainer(
        folder / name, tiny_vit(dropout=0.0), per_device_train_batch_size=32 // processes, learning_rate=1e-3,
        per_device_eval_batch_size=100 // processes, **options,
        pruning={"criterion": "taylor", "granularity": ["head", "neuron"], "target": {"params": 0.6}})

class Interrupted(Exception):
    pass

class Interrupt(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 13:  # in the second phase
            raise Interrupted

whole = trainer("whole")
whole.train()
whole.save_model(str(folder / "saved"))
if processes > 1:
    assert whole.deepspeed is not None
    weights = [None] * processes
    dist.all_gather_object(weights, {name: value.clone() for name, value in whole.model.state_dict().items()})
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    try:
        trainer("halted", callbacks=[Interrupt()]).train()
        raise AssertionError
    except Interrupted:
        pass
    again = trainer("halted")
    again.train(resume_from_checkpoint=True)
    again.save_model(str(folder / "resumed"))
"""


@pytest.mark.parametrize("stage", [1, 2])
def test_two_processes_of_zero_remove_like_one_and_resume(tmp_path, stage):
    for processes in (1, 2):
        config = CONFIGS / f"deepspeed_zero{stage}.yaml" if processes > 1 else None
        arguments = (tmp_path / str(processes), processes)
        run_script(tmp_path / "remove.py", REMOVAL, *arguments, processes=processes, config=config)
    assert not verify(tmp_path / "2" / "saved").problems
    assert read_block(tmp_path / "2" / "saved")["plan"] == read_block(tmp_path / "1" / "saved")["plan"]
    one, two, resumed = (
        load_file(tmp_path / name / "model.safetensors") for name in ("1/saved", "2/saved", "2/resumed")
    )
    for name, value in two.items():
        torch.testing.assert_close(resumed[name], value, atol=1e-6, rtol=0)
        torch.testing.assert_close(one[name], value, atol=3e-3, rtol=0)


def test_stage_3_is_refused_before_training(tmp_path):
    config = tmp_path / "zero3.yaml"
    text = (CONFIGS / "deepspeed_zero2.yaml").read_text(encoding="utf-8").replace("zero_stage: 2", "zero_stage: 3")
    config.write_text(text, encoding="utf-8")
    code = """
from hfprune.errors import ConfigError
from tests.training.setup import make_trainer, tiny_vit
import sys, pathlib
try:
    make_trainer(pathlib.Path(sys.argv[1]), tiny_vit())
    raise AssertionError
except ConfigError as error:
    assert "zero_stage: 3" in str(error), error
"""
    run_script(tmp_path / "refused.py", code, tmp_path / "out", processes=2, config=config)
