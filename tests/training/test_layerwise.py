"""Criteria that visit layers, in the trainer: steps and phases, failures, several processes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from hfprune.checkpoint import read_block
from hfprune.errors import ModelError
from tests.support.models import same, snapshot
from tests.support.processes import run_script
from tests.training.setup import PlainNet, make_trainer, tiny_vit

BOTH = pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])


@BOTH
@pytest.mark.parametrize("granularity", ["weight", "2:4"])
def test_masks_stay_through_phases(tmp_path, criterion, granularity):
    pruning = {"criterion": criterion, "granularity": granularity, "target": {"ratio": 0.5}}
    trainer = make_trainer(tmp_path, pruning=pruning)
    trainer.train()
    assert [step.achieved for step in trainer.steps] == pytest.approx([0.25, 0.5], abs=0.01)
    for name, kept in trainer.masks.kept.items():
        value = trainer.model.get_parameter(name)
        assert not value[~kept].any()
        if granularity == "2:4" and kept.shape[1] < 4:  # the patch embedding takes one channel
            assert kept.all()
            continue
        assert (~kept).float().mean() == pytest.approx(0.5, abs=0.01)
        if granularity == "2:4":
            assert (kept.view(-1, 4).sum(1) == 2).all()
    trainer.save_model(str(tmp_path / "saved"))
    assert read_block(tmp_path / "saved")["sparsity"]


@BOTH
def test_a_plain_module_in_one_shot(tmp_path, criterion):
    torch.manual_seed(0)
    pruning = {"criterion": criterion, "schedule": {"kind": "one_shot"}, "recovery": {"epochs": 0}}
    trainer = make_trainer(tmp_path, PlainNet(), pruning=pruning)
    trainer.train()
    assert trainer.masks.zeros == round(0.8 * trainer.pruner.total_units)


def test_mixed_precision_is_that_of_training(tmp_path):
    trainer = make_trainer(tmp_path, tiny_vit(), bf16=True, pruning={"criterion": "sparsegpt"})
    trainer.train()
    assert trainer.masks.zeros == round(0.8 * trainer.pruner.total_units)


@BOTH
def test_a_failure_leaves_the_model_as_it_was(tmp_path, criterion):
    trainer = make_trainer(tmp_path, pruning={"criterion": criterion})
    last = trainer.model.vit.layers[-1] if hasattr(trainer.model.vit, "layers") else trainer.model.vit.encoder.layer[-1]
    with torch.no_grad():
        next(p for p in last.parameters() if p.ndim == 2)[0, 0] = torch.nan
    before = snapshot(trainer.model)
    with pytest.raises(ModelError, match="it, or what it is given, is not finite"):
        trainer.train()
    after = snapshot(trainer.model)
    assert same(
        {k: v for k, v in before.items() if "training" not in k}, {k: after[k] for k in before if "training" not in k}
    )


SCRIPT = """
import sys
from pathlib import Path
import torch, torch.distributed as dist
from tests.training.setup import make_trainer, tiny_vit

folder, criterion, processes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
trainer = make_trainer(
    folder, tiny_vit(dropout=0.0), per_device_train_batch_size=32 // processes, learning_rate=1e-2, optim="sgd",
    pruning={"criterion": criterion, "target": 0.5, "recovery": {"epochs": 1}},
)
assert trainer.args.world_size == processes, trainer.args.world_size
trainer.train()
if dist.is_initialized():
    weights = [None] * processes
    dist.all_gather_object(weights, {name: value.clone() for name, value in trainer.model.state_dict().items()})
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
trainer.save_model(str(folder / "saved"))
"""


@BOTH
def test_two_processes_prune_alike_and_like_one(tmp_path, criterion):
    zeros = []
    for processes in (1, 2):
        folder = tmp_path / f"run-{processes}"
        run_script(tmp_path / "train.py", SCRIPT, folder, criterion, processes, processes=processes)
        weights = load_file(folder / "saved" / "model.safetensors")
        zeros.append({name: weights[name] == 0 for name in read_block(folder / "saved")["sparsity"]})
    one, two = zeros
    total = sum(value.numel() for value in one.values())
    assert sum(int(v.sum()) for v in one.values()) == sum(int(v.sum()) for v in two.values()) == round(0.5 * total)
    # Sums of two processes round differently from one's, and training goes on from there.
    assert sum(int((one[name] != two[name]).sum()) for name in one) <= 0.02 * total
