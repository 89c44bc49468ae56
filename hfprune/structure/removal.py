"""Removing units physically: cut, mend, prove; or nothing at all."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from hfprune.errors import ModelError
from hfprune.profiling import FORWARD_FAILURES
from hfprune.structure.attributes import CLEAR, LAYER, SHAPE, UNCLEAR, Proposal, apply, proposals
from hfprune.structure.graph import evaluating, uncollected
from hfprune.structure.groups import Structure
from hfprune.structure.proof import compare, reference, values_of
from hfprune.structure.surgery import Journal, cut, kept_indices

_LAYER_FACTS = ("groups", "num_groups")
_MOST_UNCLEAR = 5
"""So many kinds of unclear attributes are tried in every combination."""


@dataclass
class Removal:
    """What a removal changed.

    Attributes:
        attributes: module path to attribute to its new value; of torch's own layers only what the shapes of their
            weights don't tell.
        kept: tensor name to dimension to the indices that stayed.
        difference: how far the proof found both models apart, relative to the outputs.
        journal: takes the removal back.
    """

    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    kept: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    difference: float = 0.0
    journal: Journal = field(default_factory=Journal)


@uncollected()
def remove(structure: Structure, removed: dict[str, torch.Tensor]) -> Removal:
    """Removes units from the model in place and proves it right.

    Args:
        structure: the analysis of the model as it is.
        removed: group name to the indices of the units that go.

    Raises:
        ModelError: the smaller model does not run or is not equal; the model is as it was.
    """
    gone = structure.gone(removed)
    journal = Journal()
    with evaluating(structure.model):
        try:
            state = values_of(structure)
            expected = reference(structure, gone, state=state)
            kept = kept_indices(structure, gone)
            cut(structure.model, kept, journal)
            exactly = partial(reference, structure, gone, dtype=torch.float64, state=state)
            chosen, difference = _mend(structure, gone, partial(compare, structure, expected, exactly), journal)
        except FORWARD_FAILURES as error:
            journal.rollback()
            raise ModelError(f"the removal was taken back: {str(error).strip().splitlines()[0]}") from error
        except BaseException:
            journal.rollback()
            raise
    attributes: dict[str, dict[str, Any]] = {}
    for proposal in chosen:
        if proposal.certainty != LAYER or proposal.name in _LAYER_FACTS:
            attributes.setdefault(proposal.path, {})[proposal.name] = proposal.value
    return Removal(attributes, kept, difference, journal)


def _mend(
    structure: Structure, gone: np.ndarray, prove: Callable[[], float], journal: Journal
) -> tuple[list[Proposal], float]:
    """Sets the attributes with which the model runs and proves equal; the likeliest are tried first."""
    found = proposals(structure, gone)
    apply(structure.model, [p for p in found if p.certainty == LAYER], journal)
    first_error: BaseException | None = None
    for chosen in _choices(found):
        trial = Journal()
        try:
            apply(structure.model, chosen, trial)
            difference = prove()
        except FORWARD_FAILURES as error:
            trial.rollback()
            first_error = first_error or error
            continue
        journal.add(trial.rollback)
        return _with_the_rest(structure, found, chosen, prove, journal), difference
    raise first_error or ModelError("the smaller model could not be run")


def _choices(found: list[Proposal]) -> Iterator[list[Proposal]]:
    """Sets of proposals, the likeliest first."""
    by = {c: [p for p in found if p.certainty == c] for c in (CLEAR, UNCLEAR, SHAPE)}
    tried: list[list[Proposal]] = []
    whole = [(CLEAR, UNCLEAR), (CLEAR,), (CLEAR, UNCLEAR, SHAPE), (CLEAR, SHAPE), ()]
    keys = list(dict.fromkeys(p.key for p in found if p.certainty in (UNCLEAR, SHAPE)))[:_MOST_UNCLEAR]
    some = [set(s) for n in range(1, len(keys)) for s in itertools.combinations(keys, n)]
    candidates = [[p for c in kinds for p in by[c]] for kinds in whole]
    candidates += [[*by[CLEAR], *(p for p in found if p.certainty != LAYER and p.key in keys)] for keys in some]
    # Values of a config are changed only where nothing else helps: other code may read them for other things.
    candidates = [[p for p in c if not p.name.startswith("config.")] for c in candidates] + candidates
    for candidate in candidates:
        if candidate not in tried:
            tried.append(candidate)
            yield candidate


def _with_the_rest(
    structure: Structure, found: list[Proposal], chosen: list[Proposal], prove: Callable[[], float], journal: Journal
) -> list[Proposal]:
    """Attributes that the forward pass does not need, for those who read them elsewhere; only if all stays equal."""
    rest = [p for p in found if p.certainty == SHAPE and p not in chosen and not p.name.startswith("config.")]
    unread = [p for p in rest if not p.needed]
    chosen = [p for p in found if p.certainty == LAYER] + chosen + unread
    apply(structure.model, unread, journal)
    rest = [p for p in rest if p.needed]
    if not rest:
        return chosen
    trial = Journal()
    try:
        apply(structure.model, rest, trial)
        prove()
    except FORWARD_FAILURES:
        trial.rollback()
        return chosen
    journal.add(trial.rollback)
    return chosen + rest
