"""Runs that shard the model (FSDP2): the masks and weights of one process, whole checkpoints, and exact resume."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTForImageClassification

from hfprune.checkpoint import read_block, verify
from tests.support.processes import ROOT, run_script

CONFIG = ROOT / "recipes" / "accelerate" / "fsdp2.yaml"

SCRIPT = """
import sys
from pathlib import Path
import torch, transformers
from hfprune.masks import ShardedMaskSet
from hfprune.sharding import is_sharded, local
from tests.training.setup import make_trainer, tiny_vit

transformers.utils.logging.disable_progress_bar()
folder, processes = Path(sys.argv[1]), int(sys.argv[2])
PRUNING = {
    "hybrid": {"criterion": "l1", "recovery": {"epochs": [1, 2]},
               "schedule": {"kind": "hybrid", "steps": 2, "first": .5}},
    "gradual": {"criterion": "movement", "granularity": "2:4", "target": .5,
                "schedule": {"kind": "cubic", "steps": 2, "every": 2}},
}

def trainer(name, folder, **options):
    return make_trainer(
        folder, tiny_vit(dropout=0.0), per_device_train_batch_size=32 // processes, learning_rate=1e-2, pruning=
        PRUNING[name] | {"recovery": PRUNING[name].get("recovery", {"epochs": 2}) | {"restore_best": name != "hybrid"}},
        optim="sgd" if name == "hybrid" else "adamw_torch", per_device_eval_batch_size=100 // processes, **options)

class Interrupted(Exception):
    pass

class Interrupt(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 9:
            raise Interrupted

for name in PRUNING:
    whole = trainer(name, folder / name)
    assert whole.args.world_size == processes
    whole.train()
    parameters = dict(whole.model.named_parameters())
    if processes > 1:
        assert isinstance(whole.masks, ShardedMaskSet)
        assert all(is_sharded(value) for value in parameters.values())
        # No process holds the whole: its parts of weights and masks are about its share.
        held = sum(local(value).numel() for value in parameters.values())
        assert held < 0.6 * sum(value.numel() for value in parameters.values())
        assert sum(whole.masks.kept.numel(name) for name in whole.masks) < 0.6 * whole.masks.numel
    for parameter, kept in zip((local(parameters[n]) for n in whole.masks), whole.masks.kept.values(), strict=True):
        assert not parameter[~kept].any()
    whole.save_model(str(folder / name / "saved"))
    metric = whole.evaluate()["eval_loss"]
    if name == "hybrid":
        halted = trainer(name, folder / "halted", callbacks=[Interrupt()])
        try:
            halted.train()
            raise AssertionError
        except Interrupted:
            pass
        again = trainer(name, folder / "halted")
        again.train(resume_from_checkpoint=True)
        assert again.evaluate()["eval_loss"] == metric
        again.save_model(str(folder / "resumed"))
"""


def test_two_sharded_processes_prune_like_one_and_resume(tmp_path):
    for processes in (1, 2):
        folder = tmp_path / f"run-{processes}"
        config = CONFIG if processes > 1 else None
        run_script(tmp_path / "train.py", SCRIPT, folder, processes, processes=processes, config=config)
    for name in ("hybrid/checkpoint-4", "hybrid/saved", "gradual/saved"):
        one, two = (tmp_path / f"run-{processes}" / name for processes in (1, 2))
        assert not verify(two).problems
        expected, found = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
        assert found.keys() == expected.keys()
        assert read_block(two)["sparsity"].keys() == read_block(one)["sparsity"].keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=1e-3, rtol=0)
        records = read_block(one)["sparsity"]
        different = sum(int(((found[key] == 0) != (expected[key] == 0)).sum()) for key in records)
        total = sum(record["numel"] for record in records.values())
        # The sums of two processes round differently from one's, so that neighbours at the threshold may change places.
        assert different <= 1e-3 * total
        assert sum(r["zeros"] for r in records.values()) == sum(
            r["zeros"] for r in read_block(two)["sparsity"].values()
        )
    saved = tmp_path / "run-2" / "hybrid" / "saved"
    assert ViTForImageClassification.from_pretrained(saved).config.architectures == ["ViTForImageClassification"]
    whole, resumed = load_file(saved / "model.safetensors"), load_file(tmp_path / "run-2" / "resumed/model.safetensors")
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


SELECT = """
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from hfprune import PruningConfig
from hfprune.errors import HfpruneError
from hfprune.pruner import Pruner
from hfprune.sharded import ShardedPruner
from hfprune.sharding import AcrossProcesses

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 3)
        self.first, self.last = nn.Linear(8, 7), nn.Linear(7, 1)  # fewer rows than processes
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_((parameter * 20).round() / 20)  # ties everywhere

    def forward(self, x):
        pooled = torch.relu(self.up(torch.relu(self.conv(x)))).mean((2, 3))
        return self.last(torch.relu(self.first(pooled))).squeeze(-1)

def make():
    torch.manual_seed(0)
    return Net()

dist.init_process_group("gloo")
rank, count = dist.get_rank(), dist.get_world_size()
torch.manual_seed(5)
batches = [(torch.randn(4, 3, 8, 8), torch.randn(4)) for _ in range(4)]
common = {"schedule": {"kind": "constant", "steps": 2}}
for what in (
    {"criterion": "l1", "target": 0.7, "min_kept": 3, "per_layer": {"first": 0.25}},
    {"criterion": "random", "target": 0.5, "scope": "layer"},
    {"criterion": "lamp", "target": 0.5},
    {"criterion": {"name": "taylor", "absolute": True}, "target": 0.5},
    {"criterion": "movement", "target": 0.5, "granularity": "2:4"},
    {"criterion": "l2", "target": 0.5, "granularity": "block:2x2"},
):
    config = PruningConfig(**what, **common)
    one, many = make(), make()
    alone, together = Pruner(one, config), ShardedPruner(many, config, AcrossProcesses(torch.device("cpu")))
    fully_shard(many.first)
    fully_shard(many)
    together.follow(many)
    expected = found = None
    for target in config.targets():
        expected = alone.select(target, expected, data=batches).apply(one)
        found = together.select(target, found, data=batches[rank::count]).apply(many)
        joined = found.joined(True)
        assert joined.digest() == expected.digest(), what
        assert found.zeros == expected.zeros and found.numel == expected.numel
        assert together.gone(found) == alone.gone(expected)
    for name, parameter in one.named_parameters():
        assert torch.equal(dict(many.named_parameters())[name].full_tensor(), parameter)

# What one process stumbles over is an error in all of them.
with torch.no_grad():
    if rank == 1:
        dict(many.named_parameters())["conv.weight"].to_local().fill_(torch.nan)
for criterion, where in (("l1", "conv.weight"), ("taylor", "calibration batch 1")):
    pruner = ShardedPruner(many, PruningConfig(criterion=criterion, target=0.5), AcrossProcesses(torch.device("cpu")))
    try:
        pruner.select(0.5, data=batches[rank::count])
        raise AssertionError
    except HfpruneError as error:
        assert where in str(error) or "another process" in str(error), error
"""


def test_four_sharded_processes_select_exactly_what_one_selects(tmp_path):
    run_script(tmp_path / "choose.py", SELECT, processes=4)


REMOVE = """
import sys
from pathlib import Path
import torch, torch.distributed as dist, transformers
from hfprune.errors import ModelError
from hfprune.sharding import is_sharded, local
from tests.training.setup import make_trainer, tiny_vit

transformers.utils.logging.disable_progress_bar()
folder, processes = Path(sys.argv[1]), int(sys.argv[2])
PRUNING = {
    "taylor": {"criterion": "taylor", "granularity": ["head", "neuron"], "target": {"macs": 0.6}},
    "layers": {"criterion": "l1", "granularity": ["layer", "width"], "target": {"params": 0.5},
               "recovery": {"epochs": 1}},
}

def trainer(name, folder, **options):
    return make_trainer(
        folder, tiny_vit(dropout=0.0), per_device_train_batch_size=32 // processes, learning_rate=1e-2, optim="sgd",
        per_device_eval_batch_size=100 // processes, pruning=PRUNING[name], **options)

class Interrupted(Exception):
    pass

class Interrupt(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 13:  # in the second phase
            raise Interrupted

for name in PRUNING:
    whole = trainer(name, folder / name)
    assert whole.args.world_size == processes
    dense = sum(value.numel() for value in whole.model.parameters())
    whole.train()
    parameters = list(whole.model.parameters())
    assert sum(value.numel() for value in parameters) < 0.75 * dense
    if processes > 1:
        assert all(is_sharded(value) for value in parameters)
        assert sum(local(value).numel() for value in parameters) < 0.6 * sum(value.numel() for value in parameters)
        assert all(value.is_meta for value in whole.shards.skeleton.parameters())
    whole.save_model(str(folder / name / "saved"))
    metric = whole.evaluate()["eval_loss"]
if processes > 1:
    halted = trainer("taylor", folder / "halted", callbacks=[Interrupt()])
    try:
        halted.train()
        raise AssertionError
    except Interrupted:
        pass
    again = trainer("taylor", folder / "halted")
    again.train(resume_from_checkpoint=True)
    again.save_model(str(folder / "resumed"))

    # What does not prove equal leaves the sharded model as it was.
    from hfprune.structure import pruner as structured
    failing = trainer("layers", folder / "failing")
    failing.begin_sharding()
    before = {name: local(value).clone() for name, value in failing.model.state_dict().items()}
    def refuse(*_):
        raise ModelError("not equal")
    remove, structured.remove = structured.remove, refuse
    try:
        failing.method.prune_to(0.3)
        raise AssertionError
    except ModelError as error:
        assert "not equal" in str(error), error
    structured.remove = remove
    after = failing.model.state_dict()
    assert after.keys() == before.keys() and not failing.pruner.plan.dropped
    assert all(torch.equal(local(after[name]), value) for name, value in before.items())
"""


def test_two_sharded_processes_remove_like_one_and_resume(tmp_path):
    for processes in (1, 2):
        config = CONFIG if processes > 1 else None
        run_script(
            tmp_path / "remove.py", REMOVE, tmp_path / str(processes), processes, processes=processes, config=config
        )
    for name in ("taylor", "layers"):
        one, two = (tmp_path / processes / name / "saved" for processes in "12")
        assert not verify(two).problems
        assert read_block(two)["plan"] == read_block(one)["plan"]
        expected, found = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=1e-3, rtol=0)
    saved = tmp_path / "2" / "taylor" / "saved"
    whole, resumed = load_file(saved / "model.safetensors"), load_file(tmp_path / "2" / "resumed/model.safetensors")
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
    assert (
        sum(value.numel() for value in whole.values())
        == ViTForImageClassification.from_pretrained(saved).num_parameters()
    )


RECIPE = """
import sys
from pathlib import Path
import torch.distributed as dist
from hfprune.pipeline import run
from hfprune.recipe import Recipe
from tests.test_pipeline import quiet, recipe_values

PRUNING = {
    "masks": {},
    "removal": {"granularity": "neuron", "target": {"params": 0.8}, "recovery": {"epochs": 1}},
}
for name, pruning in PRUNING.items():
    folder = Path(sys.argv[1]) / name
    recipe = Recipe.parse(recipe_values(folder, training={"per_device_train_batch_size": 8}, pruning=pruning))
    report = run(recipe, console=quiet())
    dist.barrier()
    if dist.get_rank() == 0:  # as if it had been ended before its result was written
        for name in ("config.json", "pruning_report.json"):
            (folder / name).unlink()
    dist.barrier()
    again = run(recipe, resume=True, console=quiet())
    assert again["pruned"]["metric"] == report["pruned"]["metric"], (again["pruned"], report["pruned"])
"""


def test_recipes_run_sharded_and_resume(tmp_path):
    run_script(tmp_path / "recipe.py", RECIPE, tmp_path, processes=2, config=CONFIG)
    reports = {}
    for name in ("masks", "removal"):
        folder = tmp_path / name
        assert not verify(folder).problems
        assert (folder / "dense" / "model.safetensors").is_file() and (folder / "README.md").is_file()
        reports[name] = json.loads((folder / "pruning_report.json").read_text())
    masked, removed = reports.values()
    assert masked["steps"][-1]["achieved"] == pytest.approx(0.5, abs=1e-3)
    assert masked["pruned"]["nonzero"] < masked["dense"]["nonzero"] == masked["dense"]["params"]
    assert sum(record["zeros"] for record in masked["sparsity"].values()) > 0
    assert removed["pruned"]["params"] <= 0.8 * removed["dense"]["params"]
    assert removed["pruned"]["macs"] < removed["dense"]["macs"]
    assert all(group["kept"] < group["units"] for group in removed["removed"]["groups"].values())


REFUSED = """
import os
from hfprune.errors import ConfigError
from tests.training.setup import make_trainer, tiny_vit
import sys, pathlib

def refused(words, pruning=None, **options):
    try:
        make_trainer(pathlib.Path(sys.argv[1]), tiny_vit(), pruning=pruning or {}, **options)
        raise AssertionError(words)
    except ConfigError as error:
        assert words in str(error) and "\\n" not in str(error), error

refused("pruning.granularity: rank", {"granularity": "rank", "criterion": "whitening"})
refused("pruning.strategy: ice", {"granularity": "neuron", "target": 0.5, "strategy": "ice", "schedule": {}})
refused("pruning.criterion: 'movement'", {"criterion": "movement", "granularity": "neuron"})
refused("pruning.criterion: 'block_influence'", {"criterion": "block_influence", "granularity": "layer"})
refused("pruning.target.latency", {"granularity": "neuron", "target": {"latency": 0.5}})
refused("pruning.criterion: 'wanda'", {"criterion": "wanda"})
refused("pruning.criterion: 'fisher'", {"criterion": "fisher"})
refused("pruning.recovery.distill", {"recovery": {"epochs": 1, "distill": {"alpha": 0.5}}})
refused("pruning.recovery.max_drop", {"recovery": {"epochs": 1, "max_drop": {"relative": 0.5}}})
refused("training.torch_compile", torch_compile=True)
refused("training.push_to_hub", push_to_hub=True)
for key, value, words in (
    ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading"),
    ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params"),
    ("FSDP_ACTIVATION_CHECKPOINTING", "true", "fsdp_activation_checkpointing"),
    ("FSDP_VERSION", "1", "fsdp_version: 1"),
):
    before = os.environ[key] if key in os.environ else None
    os.environ[key] = value
    refused(words)
    os.environ[key] = before or "false"
"""


def test_what_shards_cant_do_is_refused_before_training(tmp_path):
    run_script(tmp_path / "refused.py", REFUSED, tmp_path / "out", processes=2, config=CONFIG)
    assert not list((tmp_path / "out").glob("*/*"))


@pytest.mark.parametrize("path", sorted(CONFIG.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_are_accelerates(path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_processes == 2
