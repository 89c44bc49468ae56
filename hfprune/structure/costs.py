"""Parameters and multiplications of a model for any choice of removed units, exactly, without building it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np

from hfprune.structure.coupling import Walk


@dataclass(frozen=True)
class _Term:
    """A product: `constant` times the number of kept identities of each factor."""

    constant: float
    factors: tuple[np.ndarray, ...]


class Costs:
    """What a model costs when some identities are gone.

    Args:
        walk: the walk over its graph.
        labels: the representative of every identity.
        parameters: names of what counts as a parameter; buffers do not.
    """

    def __init__(self, walk: Walk, labels: np.ndarray, parameters: set[str]):
        self._labels = labels
        self._modules = [p.module for p in walk.products]
        self._macs = [_Term(p.constant, tuple(labels[f.numpy()] for f in p.factors)) for p in walk.products]
        dims: dict[str, dict[int, np.ndarray]] = {}
        for member in walk.members:
            if member.name in parameters:
                dims.setdefault(member.name, {})[member.dim] = labels[member.first : member.first + member.size]
        sizes = {walk.graph.names[place]: t.numel() for place, t in walk.graph.tensors.items()}
        self._params = [
            _Term(sizes[name] // int(np.prod([len(f) for f in own.values()])), tuple(own.values()))
            for name, own in dims.items()
        ]
        counted = sum(sizes[name] for name in dims)
        everything = {id(t): t for n, t in walk.graph.tensors.items() if walk.graph.names[n] in parameters}
        self._already: np.ndarray | None = None
        self._constant_params = sum(t.numel() for t in everything.values()) - counted + walk.graph.unused_parameters

    def without(self, gone: np.ndarray) -> Costs:
        """The same of the model from which these identities are gone."""
        smaller = copy.copy(self)
        smaller._already = gone
        return smaller

    def macs(self, gone: np.ndarray | None = None) -> float:
        """Multiply-accumulates of one example."""
        return _total(self._macs, self._already if gone is None else gone)

    def macs_of(self, path: str) -> float:
        """Multiply-accumulates of one example inside a module."""
        inside = [t for t, m in zip(self._macs, self._modules, strict=True) if m == path or m.startswith(f"{path}.")]
        return _total(inside, self._already)

    def params(self, gone: np.ndarray | None = None) -> float:
        """Parameters, tied ones once."""
        return _total(self._params, self._already if gone is None else gone) + self._constant_params

    def marginal(self, kind: str, gone: np.ndarray) -> np.ndarray:
        """What removing each identity would save now, all else as in `gone`; by representative."""
        terms = self._macs if kind == "macs" else self._params
        saved = np.zeros(len(self._labels))
        for term in terms:
            kept = [(~gone[factor]).sum() for factor in term.factors]
            for position, factor in enumerate(term.factors):
                others = np.prod([n for i, n in enumerate(kept) if i != position])
                np.add.at(saved, factor, term.constant * others)
        return saved


def _total(terms: list[_Term], gone: np.ndarray | None) -> float:
    total = 0.0
    for term in terms:
        kept = [len(f) if gone is None else int((~gone[f]).sum()) for f in term.factors]
        total += term.constant * float(np.prod(kept))
    return total
