"""Groups that a test expects, and the dense model with silent channels that a removal must be equal to."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

import hfprune
from hfprune import PruningConfig
from hfprune.structure.groups import analyse
from hfprune.structure.removal import remove

Places = dict[str, Iterable[int]]
"""`tensor[dim]` to indices along that dimension."""


def spread(model: nn.Module) -> nn.Module:
    """Weights of either sign between .8 and 1.2, scaled by the fan-in: no unit is small by chance, none cancels out."""
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            sign = torch.randint(0, 2, parameter.shape) * 2 - 1
            scale = max(1, parameter.numel() // max(parameter.shape)) ** -0.5
            parameter.copy_(sign * torch.empty(parameter.shape).uniform_(0.8, 1.2) * scale)
        for name, buffer in sorted(model.named_buffers()):
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
            elif name.endswith("running_mean"):
                buffer.normal_()
    return model.eval()


def scaled(model: nn.Module, places: Places, factor: float) -> nn.Module:
    """Multiplies slices of parameters and buffers in place."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for place, indices in places.items():
            name, _, dim = place.removesuffix("]").rpartition("[")
            shape = [-1 if d == int(dim) else 1 for d in range(tensors[name].ndim)]
            factors = torch.ones(tensors[name].shape[int(dim)])
            factors[list(indices)] = factor
            tensors[name].mul_(factors.view(shape))
    return model


def silenced(model: nn.Module, places: Places) -> nn.Module:
    """A copy with slices at zero, whose norms take their statistics over what is left.

    A channel that is zero stays so through sums, products, ReLU, GELU and SiLU; norms over channels would count it.
    """
    model = scaled(copy.deepcopy(model), places, 0.0)
    for path, module in list(model.named_modules()):
        gone = places.get(f"{path}.weight[0]")
        if gone is None or not isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
            continue
        kept = sorted(set(range(len(module.weight))) - set(gone))
        owner, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(owner), leaf, _OverKept(module, kept))
    return model


class _OverKept(nn.Module):
    def __init__(self, norm: nn.Module, kept: list[int]):
        super().__init__()
        self.norm, self.kept = norm, kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm, kept, result = self.norm, self.kept, torch.zeros_like(x)
        weight = norm.weight[kept]
        if isinstance(norm, nn.GroupNorm):
            result[:, kept] = F.group_norm(x[:, kept], norm.num_groups, weight, norm.bias[kept], norm.eps)
        elif isinstance(norm, nn.LayerNorm):
            result[..., kept] = F.layer_norm(x[..., kept], (len(kept),), weight, norm.bias[kept], norm.eps)
        else:
            result[..., kept] = F.rms_norm(x[..., kept], (len(kept),), weight, norm.eps)
        return result


HALF = {"granularity": "channel", "target": 0.5, "scope": "layer", "round_to": 1}


def places_of(*members, units):
    """`tensor[dim]` to what units take of it; a member is a place, or a place and the indices of every unit."""
    return {
        member if isinstance(member, str) else member[0]: [[u] for u in range(units)]
        if isinstance(member, str)
        else [list(indices) for indices in member[1]]
        for member in members
    }


def group(kind, units, *members):
    """What a group is expected to be."""
    return kind, units, places_of(*members, units=units)


def found_groups(model, inputs, even_heads=False):
    """Without their names, which need not be the ones that a person would give."""
    groups = [group for group in analyse(model, inputs, even_heads=even_heads).groups.values() if group.units > 1]
    return in_order((g.kind, g.units, {f"{m.tensor}[{m.dim}]": m.indices.tolist() for m in g.members}) for g in groups)


def in_order(groups):
    return sorted(groups, key=lambda group: sorted(map(str, group[2].items())))


def check_once_cut(model, inputs, even_heads):
    """What is known after a cut is what a new look finds."""
    structure = analyse(model, inputs, even_heads=even_heads)
    removed = {group.name: torch.tensor([1]) for group in structure.groups.values() if group.units > 2}
    remove(structure, removed)
    assert_alike(structure.without(removed), analyse(model, inputs, even_heads=even_heads))


def assert_alike(known, found):
    """Two structures say the same of what can be removed; the last unit of a group may look like another group."""
    several = [group for group in known.groups.values() if group.units > 1]
    last = {member.tensor for group in known.groups.values() if group.units == 1 for member in group.members}
    others = (g for g in found.groups.values() if g.units > 1 and not {m.tensor for m in g.members} <= last)
    assert [group.name for group in several] == [group.name for group in others]
    for group in several:
        other = found.groups[group.name]
        assert (group.kind, group.units) == (other.kind, other.units)
        members = [[(m.tensor, m.dim, m.indices.tolist()) for m in g.members] for g in (group, other)]
        assert members[0] == members[1]
        savings = [s.costs.marginal("macs", s.gone({}))[g.identities] for s, g in ((known, group), (found, other))]
        assert savings[0].tolist() == savings[1].tolist()
    assert known.costs.params() == found.costs.params() and known.costs.macs() == found.costs.macs()


def check(model, inputs, expected, granularity="channel"):
    """The groups are these, also once a unit of each is gone; every other unit, made the least important, goes; the
    result is the silenced original."""
    spread(model)
    assert found_groups(model, inputs, granularity == "head_dim") == in_order(expected.values())
    check_once_cut(copy.deepcopy(model), inputs, granularity == "head_dim")
    gone = {}
    for _, units, places in expected.values():
        for place, indices in places.items():
            gone.setdefault(place, []).extend(i for unit in range(1, units, 2) for i in indices[unit])
    scaled(model, {place: indices for place, indices in gone.items() if "running" not in place}, 0.5)
    reference = silenced(model, gone)
    dense = {name: tensor.shape for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    report = hfprune.prune(model, PruningConfig(**HALF | {"granularity": granularity}), example_inputs=inputs)

    with torch.no_grad():
        wanted, outputs = reference(*inputs), model(*inputs)
    assert wanted.abs().max() > 0.01
    torch.testing.assert_close(outputs, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert report.units == sum(units for _, units, _ in expected.values())
    assert report.pruned == sum(units // 2 for _, units, _ in expected.values())
    assert sorted(report.groups.values()) == sorted((units, units - units // 2) for _, units, _ in expected.values())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        cut = [len(set(gone.get(f"{name}[{dim}]", ()))) for dim in range(tensor.ndim)]
        assert tensor.shape == tuple(n - c for n, c in zip(dense[name], cut, strict=True)), name
    return model
