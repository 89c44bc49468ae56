"""Recognisers in two processes: the same masks in both, and one error rate over all that was said."""

import json

import pytest

from tests.speech.sounds import record
from tests.support.processes import run_script

SCRIPT = """
import json, sys
from pathlib import Path
import torch.distributed as dist
from hfprune import Recipe
from hfprune.pipeline import prepare_run
from hfprune.training import PruningTrainer

folder = Path(sys.argv[1])
ctc = {"hidden_size": 32, "intermediate_size": 48, "layers": 1, "heads": 2, "channels": 16, "letters": "abc"}
whisper = {"hidden_size": 16, "intermediate_size": 24, "encoder_layers": 1, "decoder_layers": 1, "heads": 2,
           "mel_bins": 8, "seconds": 1, "longest_text": 8}
found = {}
for name, args, epochs in (("small_wav2vec2", ctc, 30), ("small_whisper", whisper, 2)):
    job = prepare_run(Recipe.parse({
        "model": {"name": f"hfprune.scratch_speech:{name}", "args": args},
        "data": {"name": str(folder / "sounds"), "task": "speech-recognition", "metrics": ["wer", "cer"]},
        "pruning": {"criterion": "taylor", "granularity": "weight", "target": 0.5, "recovery": {"epochs": epochs},
                    "schedule": {"kind": "constant", "steps": 1}},
        "training": {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 2, "learning_rate": 3e-3,
                     "seed": 0, "disable_tqdm": True, "use_cpu": True},
        "output": {"folder": str(folder / name)},
    }))
    trainer = job.trainer
    assert isinstance(trainer, PruningTrainer)
    trainer.train()
    compute, heard = trainer.compute_metrics, []
    trainer.compute_metrics = lambda answers: heard.append(len(answers.label_ids)) or compute(answers)
    metrics = trainer.evaluate()
    found[name] = {
        "processes": [trainer.args.world_size, dist.get_world_size(), dist.get_backend()],
        "digest": trainer.masks.digest(),
        "sparsity": trainer.masks.zeros / trainer.masks.numel,
        "recordings": heard,
        "losses": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
        "rates": [metrics["eval_wer"], metrics["eval_cer"]],
    }
(folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
"""


def test_two_processes_prune_recognisers_alike(tmp_path):
    record(tmp_path / "sounds" / "train", 24)
    record(tmp_path / "sounds" / "test", 5, seed=1)
    run_script(tmp_path / "recognise.py", SCRIPT, tmp_path, processes=2)
    one, other = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert one == other and set(one) == {"small_wav2vec2", "small_whisper"}
    for found in one.values():
        assert found["processes"] == [2, 2, "gloo"]
        assert found["sparsity"] == pytest.approx(0.5, abs=1e-3)
        assert found["recordings"] == [5]  # those that fill up the last batches are not counted
        assert min(found["losses"]) < found["losses"][0]
    assert one["small_wav2vec2"]["rates"][0] < 1
