"""Trial cuts: a group whose removal does not run, or does not prove equal, is protected and reported; groups that run
only when they are cut by the same fraction (as where code divides the width by the number of heads) are linked."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from math import gcd

import torch

from hfprune.errors import ModelError
from hfprune.structure.groups import CoupledGroup, Structure
from hfprune.structure.removal import remove

NOT_RUNNING = "its removal does not run in this model's code"
"""How the reason begins where a trial cut has failed."""

Family = list[CoupledGroup]

_FRACTIONS = (0.5, 0.25, 0.4, 0.125, 0.3)


def without_impossible(structure: Structure) -> Structure:
    """The structure with only those groups that can really be cut in this model's code.

    All groups are cut at once, by different fractions, and put back. Where that fails, families of groups (of one kind,
    at like places) are tried one by one; of those that fail, the ones that share tensors are tried by one common
    fraction. What is left is protected, with the reason.

    Args:
        structure: of a model with values; it comes back unchanged.
    """
    families = _families(group for group in structure.groups.values() if group.units > 1)
    everything = [group for family in families for group in family]
    if not everything or _failure(structure, _uneven(everything)) is None:
        return structure
    reasons: dict[str, str] = {}
    together: list[CoupledGroup] = []
    for family in families:
        if (reason := _failure(structure, _uneven(family))) is None:
            together += family
        else:
            _keep_possible(structure, family, reason, together, reasons)
    links = _linked(structure, [group for group in everything if group.name in reasons])
    linked = {name for link in links for name in link}
    together = _fitting(structure, together, links, reasons)
    return _reported(structure, together, links, {n: r for n, r in reasons.items() if n not in linked})


def _families(groups: Iterable[CoupledGroup]) -> list[Family]:
    """Groups of one kind at like places, whose names differ in numbers alone."""
    families: dict[tuple[str, str], Family] = defaultdict(list)
    for group in groups:
        families[group.kind, re.sub(r"\d+", "#", group.name)].append(group)
    return list(families.values())


def _keep_possible(
    structure: Structure, family: Family, reason: str, together: Family, reasons: dict[str, str]
) -> None:
    """Some members of a family may be possible where others are not."""
    for group in family:
        alone = reason if len(family) == 1 else _failure(structure, _uneven([group]))
        if alone is None:
            together.append(group)
        else:
            reasons[group.name] = alone


def _linked(structure: Structure, failed: Family) -> list[tuple[str, ...]]:
    """Those of the failed groups that can be cut by one fraction, in sets that share tensors (or an attention)."""
    links: list[tuple[str, ...]] = []
    rest = {group.name: group for group in failed}
    while rest:
        first = next(iter(rest))
        found, places = {first: rest.pop(first)}, set()
        places = _places(found[first])
        while more := [group for group in rest.values() if places & _places(group)]:
            for group in more:
                found[group.name] = rest.pop(group.name)
                places |= _places(group)
        pieces = gcd(*(group.units for group in found.values()))
        cut = {n: torch.arange(g.units // pieces * max(1, pieces // 2)) for n, g in found.items()}
        if len(found) > 1 and pieces > 1 and _failure(structure, cut) is None:
            links.append(tuple(found))
    return links


def _places(group: CoupledGroup) -> set[str]:
    """Where a group lies: its tensors; inside heads also the attention, whose code has one size for keys and values."""
    tensors = {member.tensor for member in group.members}
    around = {tensor.rsplit(".", 2)[0] for tensor in tensors} if group.kind == "head_dim" else set()
    return tensors | around


def _fitting(structure: Structure, together: Family, links: list[tuple[str, ...]], reasons: dict[str, str]) -> Family:
    """What can be cut all at once, beside what is linked; each alone is known to work."""

    def cuts(groups: Family) -> dict[str, torch.Tensor]:
        chosen = _uneven(groups)
        for link in links:
            pieces = gcd(*(structure.groups[name].units for name in link))
            for name in link:
                chosen[name] = torch.arange(structure.groups[name].units // pieces * max(1, pieces // 2))
        return chosen

    if _failure(structure, cuts(together)) is None:
        return together
    fitting: Family = []
    for family in _families(together):
        if (reason := _failure(structure, cuts([*fitting, *family]))) is None:
            fitting += family
        else:
            reasons |= {group.name: f"{reason}, with the others" for group in family}
    return fitting


def _reported(
    structure: Structure, together: Family, links: list[tuple[str, ...]], reasons: dict[str, str]
) -> Structure:
    protected = {reason: list(places) for reason, places in structure.protected.items()}
    for name, reason in reasons.items():
        group = structure.groups[name]
        text = f"{NOT_RUNNING}: {reason}"
        protected.setdefault(text, [])
        protected[text] += [f"{member.tensor}[{member.dim}]" for member in group.members]
    kept = {group.name for group in together} | {name for link in links for name in link}
    kept |= {name for name, group in structure.groups.items() if group.units == 1}
    groups = {name: group for name, group in structure.groups.items() if name in kept}
    return replace(structure, groups=groups, protected=protected, links=tuple(links))


def _uneven(groups: Family) -> dict[str, torch.Tensor]:
    """Different fractions of the groups, in turn: code that needs them alike does not pass."""
    chosen = {}
    for index, group in enumerate(groups):
        count = max(1, round(_FRACTIONS[index % len(_FRACTIONS)] * group.units))
        count = min(count, group.units - 1)
        chosen[group.name] = torch.arange(count) * group.units // count
    return chosen


def _failure(structure: Structure, removed: dict[str, torch.Tensor]) -> str | None:
    """Why these units can't be removed; None where they can. The model is as before."""
    try:
        removal = remove(structure, removed)
    except ModelError as error:
        return str(error).removeprefix("the removal was taken back: ")
    removal.journal.rollback()
    return None
