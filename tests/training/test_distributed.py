"""Several processes: one run, the same masks on all, and the result that one process gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hfprune.checkpoint import read_block
from tests.support.processes import run_script

SCRIPT = """
import sys
from pathlib import Path
import torch, torch.distributed as dist
from tests.training.setup import make_trainer, tiny_vit

folder, criterion, every, batch = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
schedule = {"kind": "cubic", "steps": 2, "every": every} if every else {"kind": "constant", "steps": 2}
trainer = make_trainer(
    folder, tiny_vit(dropout=0.0), per_device_train_batch_size=batch, learning_rate=1e-2, optim="sgd",
    pruning={"criterion": criterion, "schedule": schedule, "recovery": {"epochs": 2}},
)
assert trainer.args.world_size == int(sys.argv[5]), trainer.args.world_size
trainer.train()
if dist.is_initialized():
    digests = [None] * dist.get_world_size()
    dist.all_gather_object(digests, trainer.masks.digest())
    assert len(set(digests)) == 1
trainer.save_model(str(folder / "saved"))
"""


def launch(folder: Path, processes: int, criterion: str, every: int) -> dict:
    arguments = (folder / f"run-{processes}", criterion, every, 32 // processes, processes)
    run_script(folder / "train.py", SCRIPT, *arguments, processes=processes)
    saved = folder / f"run-{processes}" / "saved"
    weights = load_file(saved / "model.safetensors")
    return {name: weights[name] == 0 for name in read_block(saved)["sparsity"]}


@pytest.mark.parametrize(("criterion", "every", "count"), [("l1", 0, 4), ("taylor", 2, 2)])
def test_several_processes_prune_alike_and_like_one(tmp_path, criterion, every, count):
    one, many = (launch(tmp_path, processes, criterion, every) for processes in (1, count))
    different = sum(int((one[name] != many[name]).sum()) for name in one)
    total = sum(value.numel() for value in one.values())
    # The sums of several processes round differently from one's: single ties at the threshold may fall the other way.
    assert different <= 1e-3 * total
    assert sum(int(v.sum()) for v in one.values()) == sum(int(v.sum()) for v in many.values()) == round(0.8 * total)


REMOVAL = """
import sys
from pathlib import Path
import torch, torch.distributed as dist
from hfprune.errors import ModelError
from tests.training.setup import make_trainer, tiny_vit

folder, target, processes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
what = {"criterion": "taylor", "granularity": ["head", "neuron"], "target": {target: 0.6}, "round_to": 1}
if target == "blocks":
    what = {"criterion": "block_influence", "granularity": "layer", "target": 0.5}
trainer = make_trainer(
    folder, tiny_vit(dropout=0.0), per_device_train_batch_size=32 // processes, learning_rate=1e-2, optim="sgd",
    pruning=what,
)
trainer.train()
if dist.is_initialized():
    weights = [None] * processes
    dist.all_gather_object(weights, {name: value.clone() for name, value in trainer.model.state_dict().items()})
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    pruner = trainer.pruner
    if target == "macs":
        decide = type(pruner).__mro__[1].decide
        def other(self, *args, **options):
            choice = decide(self, *args, **options)
            choice.blocks = [str(dist.get_rank())]
            return choice
        type(pruner).__mro__[1].decide = other
        try:
            pruner.step(0.5, data=trainer.calibration_batches(), loss=trainer.calibration_loss)
            raise AssertionError
        except ModelError as error:
            assert "the processes chose different units" in str(error), error
trainer.save_model(str(folder / "saved"))
"""


@pytest.mark.parametrize("target", ["macs", "latency", "blocks"])
def test_two_processes_remove_alike(tmp_path, target):
    shapes = []
    for processes in (2,) if target == "latency" else (1, 2):
        folder = tmp_path / f"run-{processes}"
        run_script(tmp_path / "remove.py", REMOVAL, folder, target, processes, processes=processes)
        shapes.append({name: value.shape for name, value in load_file(folder / "saved" / "model.safetensors").items()})
    assert all(found.keys() == shapes[0].keys() for found in shapes)
    total = [sum(shape.numel() for shape in found.values()) for found in shapes]
    assert max(total) <= 1.05 * min(total)


RANKS = """
import sys
from pathlib import Path
import torch, torch.distributed as dist
from hfprune.lowrank.factor import factored_layers
from safetensors.torch import save_file
from tests.training.setup import make_trainer, tiny_vit

folder, processes = Path(sys.argv[1]), int(sys.argv[2])
trainer = make_trainer(
    folder, tiny_vit(dropout=0.0), per_device_train_batch_size=32 // processes, learning_rate=1e-2, optim="sgd",
    save_strategy="no",
    pruning={"criterion": "whitening", "granularity": "rank", "target": {"params": 0.6}, "round_to": 1,
             "recovery": {"epochs": 1}},
)
trainer.train()
if dist.is_initialized():
    weights = [None] * processes
    dist.all_gather_object(weights, {name: value.clone() for name, value in trainer.model.state_dict().items()})
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
layers = factored_layers(trainer.model)
assert layers
if trainer.is_world_process_zero():
    products = {path: layer.product().detach().contiguous() for path, layer in layers.items()}
    ranks = {path: torch.tensor(min(factor.shape[0] for factor in layer.parameters() if factor.ndim > 1))
             for path, layer in layers.items()}
    save_file(products, folder / "products.safetensors")
    save_file(ranks, folder / "ranks.safetensors")
"""


def test_two_processes_factor_alike_and_like_one(tmp_path):
    found = []
    for processes in (1, 2):
        folder = tmp_path / f"run-{processes}"
        run_script(tmp_path / "factor.py", RANKS, folder, processes, processes=processes)
        found.append([load_file(folder / f"{name}.safetensors") for name in ("ranks", "products")])
    (ranks, products), (ranks_of_two, products_of_two) = found
    assert {path: int(rank) for path, rank in ranks.items()} == {p: int(rank) for p, rank in ranks_of_two.items()}
    for path, product in products.items():
        assert torch.allclose(product, products_of_two[path], rtol=1e-2, atol=1e-4), path
