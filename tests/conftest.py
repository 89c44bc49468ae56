"""Every test starts from the same seed, on one thread, with no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _alone():
    """TrainingArguments of a sharded run tell the whole process so in its environment."""
    before = dict(os.environ)
    yield
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_")) and name not in before]:
        del os.environ[name]
