"""Every criterion and granularity in several processes, and runs of which a process dies or is told to stop."""

from __future__ import annotations

import json

import pytest

from tests.support.processes import run_script

BATTERY = """
import json, sys
from pathlib import Path
import torch, torch.distributed as dist
from hfprune.criteria import criteria
from tests.training.setup import make_trainer, tiny_vit

folder, processes = Path(sys.argv[1]), int(sys.argv[2])
kinds = {name: criteria[name] for name in criteria if name != "movement"}
masks = [(n, "weight") for n, kind in kinds.items() if not (kind.of_blocks or kind.of_units or kind.of_components)]
masks += [("taylor", "2:4"), ("l1", "block:2x2"), ("wanda", "2:4")]
removals = [("taylor", ["head", "neuron"]), ("l2", "neuron"), ("block_influence", "layer"), ("whitening", "rank")]
found = {}
for criterion, granularity in [*masks, *removals]:
    ratio = 0.5 if granularity != "rank" else 0.3
    trainer = make_trainer(
        folder / "run", tiny_vit(dropout=0.0), per_device_train_batch_size=16 // processes, eval_dataset=None,
        save_strategy="no", eval_strategy="no",
        pruning={"criterion": criterion, "granularity": granularity, "target": {"ratio": ratio}, "round_to": 1,
                 "schedule": "one_shot", "recovery": {"steps": 0}},
    )
    assert trainer.args.world_size == processes, trainer.args.world_size
    trainer.train()
    said = {name: "".join(str(int(bit)) for bit in mask.flatten()) for name, mask in trainer.masks.kept.items()}
    said |= {name: str(tuple(value.shape)) for name, value in trainer.model.state_dict().items()}
    if dist.is_initialized():
        everyone = [None] * processes
        dist.all_gather_object(everyone, said)
        assert all(each == said for each in everyone), (criterion, granularity)
    found[f"{criterion} {granularity}"] = said
(folder / f"{processes}.json").write_text(json.dumps(found))
"""


def test_every_criterion_chooses_in_two_processes_what_it_chooses_in_one(tmp_path):
    for processes in (1, 2):
        run_script(tmp_path / "battery.py", BATTERY, tmp_path, processes, processes=processes)
    one, two = (json.loads((tmp_path / f"{processes}.json").read_text()) for processes in (1, 2))
    assert one.keys() == two.keys() and len(one) >= 18
    different = {name for name in one if one[name] != two[name]}
    assert not different


FAULTS = """
import os, signal, sys
from pathlib import Path
import torch, torch.distributed as dist
from transformers import TrainerCallback
from hfprune.training.checkpoints.folder import last_checkpoint
from tests.training.setup import make_trainer, tiny_vit

folder, fault = Path(sys.argv[1]), sys.argv[2]

class Fault(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 10 and fault in ("SIGKILL", "SIGTERM") and dist.get_rank() == 1:
            os.kill(os.getpid(), getattr(signal, fault))

trainer = make_trainer(
    folder, tiny_vit(dropout=0.0), per_device_train_batch_size=16, enable_jit_checkpoint=True, callbacks=[Fault()]
)
assert trainer.args.world_size == 2
try:
    trainer.train(resume_from_checkpoint=True if fault == "resume" else None)
except SystemExit as stopped:
    assert fault == "SIGTERM" and stopped.code == 143
    assert last_checkpoint(folder).name == "checkpoint-13", last_checkpoint(folder)
else:
    assert fault in ("none", "resume")
    trainer.save_model(str(folder / "saved"))
"""


@pytest.mark.parametrize("fault", ["SIGKILL", "SIGTERM"])
def test_a_run_of_two_processes_goes_on_after(tmp_path, fault):
    def launch(folder: str, kind: str) -> None:
        run_script(tmp_path / "faults.py", FAULTS, tmp_path / folder, kind, processes=2)

    launch("whole", "none")
    if fault == "SIGKILL":
        with pytest.raises(AssertionError):
            launch("stopped", fault)
    else:
        launch("stopped", fault)
    launch("stopped", "resume")
    files = [(tmp_path / folder / "saved" / "model.safetensors").read_bytes() for folder in ("whole", "stopped")]
    assert files[0] == files[1]
