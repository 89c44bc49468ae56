"""Removals one after another: one analysis serves them all, and nothing comes out otherwise than with new ones."""

import pytest
import torch

import hfprune
from hfprune import PruningConfig
from hfprune.errors import ModelError
from hfprune.structure import removal
from hfprune.structure.groups import Structure, analyse
from hfprune.structure.pruner import StructuredPruner
from hfprune.structure.removal import remove
from tests.structure.test_choices import made
from tests.support.structures import assert_alike, spread

NAMES = ("cnn", "vit", "llama", "gpt2", "timm_vit", "timm_resnet")


@pytest.mark.parametrize("name", NAMES)
def test_a_smaller_model_is_known_without_a_new_look(name):
    model, inputs, _ = made(name)
    structure = analyse(model, inputs)
    for kept in (2, 3):  # every second unit goes, then every third
        removed = {
            name: torch.tensor([unit for unit in range(group.units) if unit % kept == 1])
            for name, group in structure.groups.items()
            if group.units > 1
        }
        remove(structure, removed)
        structure = structure.without(removed)
        assert_alike(structure, analyse(model, inputs))


def test_a_head_cut_inside_is_known_without_a_new_look():
    model, inputs, _ = made("gpt2")
    structure = analyse(model, inputs, even_heads=True)
    removed = {name: torch.tensor([1]) for name, group in structure.groups.items() if group.kind == "head_dim"}
    remove(structure, removed)
    assert_alike(structure.without(removed), analyse(model, inputs, even_heads=True))


@pytest.mark.parametrize("granularity", ["channel", ["head", "neuron"]])
def test_steps_come_out_as_with_an_analysis_each(monkeypatch, granularity):
    results = []
    for looks in (1, 3):
        if looks > 1:
            monkeypatch.setattr(Structure, "without", lambda self, removed: None)
        exports = counted(monkeypatch)
        model, inputs, _ = made("vit")
        schedule = {"kind": "constant", "steps": 3}
        options = {"granularity": granularity, "target": {"macs": 0.7}, "round_to": 1, "schedule": schedule}
        report = hfprune.prune(model, PruningConfig(**options), example_inputs=inputs)
        assert len(exports) == looks
        results.append((report.plan, report.groups, report.achieved, model.state_dict()))
    (*facts, weights), (*again, others) = results
    assert facts == again
    assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def counted(monkeypatch) -> list[None]:
    """One entry a graph made."""
    made, export = [], torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *args, **more: (made.append(None), export(*args, **more))[1])
    return made


def pruner_and_first_step():
    model, inputs, _ = made("cnn")
    config = PruningConfig(granularity="channel", target=0.5, scope="layer", round_to=1)
    pruner = StructuredPruner(model, config, inputs)
    pruner.step(0.25)
    return model, pruner


def test_the_proof_is_of_the_weights_as_they_are_now():
    model, pruner = pruner_and_first_step()
    spread(model)  # as training would: other weights, other statistics
    choice = pruner.choose(0.5)
    assert choice.units and remove(pruner.structure, choice.units).difference < 1e-5


def test_a_cut_that_is_wrong_in_a_later_step_is_taken_back(monkeypatch):
    model, pruner = pruner_and_first_step()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    choice = pruner.choose(0.5)
    cut = removal.cut

    def wrong(model, kept, journal):
        name, dims = next(iter(kept.items()))
        dim, indices = next(iter(dims.items()))
        cut(model, kept | {name: dims | {dim: indices.flip(0)}}, journal)

    monkeypatch.setattr(removal, "cut", wrong)
    with pytest.raises(ModelError, match="differs from the silenced original"):
        pruner.apply(choice)
    now = model.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


def test_what_does_not_prove_is_looked_at_anew(monkeypatch):
    model, pruner = pruner_and_first_step()
    values_of = removal.values_of

    def refused(structure):
        if structure.already.any():
            raise ModelError("no")
        return values_of(structure)

    monkeypatch.setattr(removal, "values_of", refused)
    pruner.step(0.5)
    assert pruner.gone_units() == round(0.5 * pruner.total_units)
