"""Statistics of two processes, each with its own batches, are those of one that has them all."""

from tests.support.processes import run_script

GATHER = """
import sys
import torch, torch.distributed as dist
from hfprune import PruningConfig
from hfprune.criteria import create, criteria
from hfprune.criteria.calibration import gather
from hfprune.errors import HfpruneError
from hfprune.pruner import Pruner
from hfprune.weights import prunable_weights
from tests.support.models import CNN, images

torch.manual_seed(0)
model = CNN().double().eval()
batches = [(inputs.double(), labels) for inputs, labels in (images(4, seed=seed) for seed in range(4))]
weights = prunable_weights(model)
names = [n for n in criteria if criteria[n].statistics and n not in ("obd", "synflow", "movement")]
alone = {n: gather(create(n), model, weights, batches) for n in names}
dist.init_process_group("gloo")
rank = dist.get_rank()
mine = batches[:3] if rank == 0 else batches[3:]  # not the same number
for n in names:
    found = gather(create(n), model, weights, mine)
    for key in weights:
        for one, other in zip(found[key], alone[n][key], strict=True):
            assert torch.allclose(one, other, rtol=1e-9, atol=1e-12), (n, key)
def alike(values):
    all_values = [None, None]
    dist.all_gather_object(all_values, values)
    assert all_values[0] == all_values[1], all_values
for n in ("obd", "taylor", "fisher", "wanda"):
    pruner = Pruner(model, PruningConfig(criterion=n, target=0.5))
    alike(pruner.select(0.5, data=mine).digest())
bad = [(torch.full((4, 3, 8, 8), torch.nan).double(), batches[0][1])] if rank else mine
for n in ("taylor", "fisher", "obd"):
    try:
        gather(create(n), model, weights, bad)
        raise AssertionError(n)
    except HfpruneError as error:
        words = "the loss on calibration batch 1 is nan" if rank else "another process could not run its calibration"
        assert words in str(error), error
"""


def test_two_processes_gather_alike(tmp_path):
    run_script(tmp_path / "gather.py", GATHER, processes=2)
