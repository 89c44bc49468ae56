"""Models that accelerate has spread out: pruned where their parameters wait, or refused in one line."""

import accelerate
import pytest
import torch

import hfprune
from hfprune import PruningConfig
from hfprune.errors import ModelError
from tests.support.models import llama, tokens

HALF = PruningConfig(target=0.5)


@pytest.fixture
def dense():
    torch.manual_seed(1)
    return llama(tie_word_embeddings=True)


@pytest.fixture
def expected(dense):
    torch.manual_seed(1)
    model = llama(tie_word_embeddings=True)
    hfprune.prune(model, HALF)
    return model


def test_a_device_map_of_one_device(dense, expected, tmp_path):
    dense.save_pretrained(tmp_path)
    model = type(dense).from_pretrained(tmp_path, device_map={"": "cpu"})
    hfprune.prune(model, HALF)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_parameters_that_wait_in_memory_are_pruned_there(dense, expected, tmp_path):
    accelerate.cpu_offload(dense, torch.device("cpu"))
    report = hfprune.prune(dense, HALF)
    assert all(parameter.is_meta for parameter in dense.parameters())
    with torch.no_grad():
        assert torch.equal(dense(**tokens()).logits, expected(**tokens()).logits)
    hfprune.save_pretrained(dense, tmp_path)
    assert hfprune.verify(tmp_path).zeros == report.masks.zeros
    again = type(dense).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), expected.parameters(), strict=True))


def test_what_runs_the_model_is_refused_where_parts_of_it_wait(dense):
    accelerate.cpu_offload(dense, torch.device("cpu"))
    for config in (
        PruningConfig(criterion="wanda", target=0.5, scope="layer"),
        PruningConfig(criterion="taylor", target=0.5),
        PruningConfig(granularity="neuron", target=0.5),
    ):
        with pytest.raises(ModelError, match="parts of LlamaForCausalLM are offloaded.*--stream"):
            hfprune.prune(dense, config, tokens())


def test_parameters_on_the_disk_are_refused(dense, tmp_path):
    accelerate.disk_offload(dense, tmp_path / "offload", torch.device("cpu"))
    with pytest.raises(ModelError, match="offloaded to the disk; prune the checkpoint with `hfprune prune --stream`"):
        hfprune.prune(dense, HALF)
