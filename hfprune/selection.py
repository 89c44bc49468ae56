"""Selection: from scores to what goes. Exact counts, ties included, with no copy and no sort of the scores.

The threshold is found by a radix selection over the bits of the scores: one histogram of the high bits, one of the low
bits inside the bucket that holds the threshold. Units that tie at the threshold are taken evenly over all ties, so that
no layer pays for standing first. Where the scores lie in several processes, histograms and numbers of ties are added up
over them, and what is selected is what one process selects that holds them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from hfprune.errors import ConfigError, ModelError
from hfprune.sharding import ALONE, Across

CHUNK = 1 << 18
"""Units looked at in one go: it bounds the extra memory."""

FEW_THREADS = 4

_DIGIT_BITS = 16
_DIGITS = 1 << _DIGIT_BITS


@dataclass
class LayerScores:
    """The scores of one layer's units, given out a slice at a time so that they need never lie in memory at once.

    Attributes:
        name: the weight's name.
        units: how many there are in this process.
        scores: from a range of units to their scores, a 1-D floating tensor; the lowest go first.
        gone: units that went in an earlier step, a flat bool tensor, or None.
        candidates: units that may go at all, a flat bool tensor, or None for all.
        limit: the most units that may go, those gone before included; None for no limit.
        across: the processes that hold the layer's other units; all of them make it and select from it together.
        already: units gone in an earlier step, in all processes.
        available: units that could be gone in the end, in all processes.
    """

    name: str
    units: int
    scores: Callable[[int, int], torch.Tensor]
    gone: torch.Tensor | None = None
    candidates: torch.Tensor | None = None
    limit: int | None = None
    across: Across = ALONE
    already: int = field(init=False)
    available: int = field(init=False)

    def __post_init__(self) -> None:
        gone = 0 if self.gone is None else int(self.gone.sum())
        able = self.units if self.candidates is None else int(self.candidates.sum())
        self.already, able = self.across.sum(torch.tensor([gone, able])).tolist()
        self.available = max(self.already, able if self.limit is None else min(able, self.limit))

    def all_equal(self) -> bool:
        """Whether all open units in this process have one score; it looks no further than it must."""
        first: torch.Tensor | None = None
        for _, _, _, scores in self.chunks(torch.float64):
            if not len(scores):
                continue
            first = scores[0] if first is None else first
            if not bool((scores == first).all()):
                return False
        return self.units - self.already > 1

    def chunks(self, dtype: torch.dtype) -> Iterator[tuple[int, int, torch.Tensor | None, torch.Tensor]]:
        """Ranges of units: start, stop, which of them are open (None: all), and the scores of the open ones."""
        for start in range(0, self.units, CHUNK):
            stop = min(start + CHUNK, self.units)
            scores = self.scores(start, stop).to(dtype)
            selectable = None
            if self.gone is not None and self.already:
                selectable = ~self.gone[start:stop]
            if self.candidates is not None:
                able = self.candidates[start:stop]
                selectable = able if selectable is None else selectable & able
            yield start, stop, selectable, scores if selectable is None else scores[selectable]


@dataclass
class _Cut:
    """Where the scores are cut: all below `threshold` go, and `taken` of the `ties` units that equal it."""

    threshold: float
    ties: int
    taken: int


@contextmanager
def _one_thread_where_few() -> Iterator[None]:
    """On a machine of few cores, one thread: the many short operations would wait for one another at every step as soon
    as a core is busy with something else, which costs far more than the second core gives."""
    threads = torch.get_num_threads()
    if threads > FEW_THREADS:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def select(layers: list[LayerScores], total: int) -> dict[str, torch.Tensor]:
    """The units that are gone after this step: those gone before, and the lowest scores of all layers together.

    Args:
        layers: the scores of every layer.
        total: how many units are to be gone in all, those gone before included.

    Returns:
        A flat bool tensor for each layer, true for what is gone; exactly `total` are true in all (of all processes).

    Raises:
        ConfigError: `total` is more than the layers' limits allow.
        ModelError: a score is not a number.
    """
    gone = dict(select_in_turn(layers, total))
    return {layer.name: gone[layer.name] for layer in layers}


def select_in_turn(layers: list[LayerScores], total: int) -> Iterator[tuple[str, torch.Tensor]]:
    """`select`, one layer after another, so that what goes need not be held for all of them; raises as it does.

    The layers come in their order, but for those that reach their limit, which come first.
    """
    dtype = _score_dtype(layers)
    for part, cut in _cuts(layers, total, dtype):
        yield from _apply_cut(part, cut, dtype)


@_one_thread_where_few()
def _cuts(layers: list[LayerScores], total: int, dtype: torch.dtype) -> list[tuple[list[LayerScores], _Cut | None]]:
    """Layers that are cut together, and where."""
    already = sum(layer.already for layer in layers)
    if total < already:
        raise ConfigError(f"target: {total} units are to be gone, but {already} are gone already")
    available = sum(layer.available for layer in layers)
    if total > available:
        raise ConfigError(
            f"pruning.target: {total} units are to go, but min_kept, ignore or the pattern leave only {available}"
        )
    found: list[tuple[list[LayerScores], _Cut | None]] = []
    free, needed = list(layers), total
    while free:
        cut = _find_cut(free, needed - sum(layer.already for layer in free), dtype)
        over = _over_limit(free, cut, dtype)
        if not over:
            found.append((free, cut))
            break
        # A layer over its limit stays over it when the others give more: it is filled to the limit and set aside.
        for layer in over:
            found.append(([layer], _find_cut([layer], layer.available - layer.already, dtype)))
            needed -= layer.available
        free = [layer for layer in free if layer not in over]
    return found


def _over_limit(layers: list[LayerScores], cut: _Cut | None, dtype: torch.dtype) -> list[LayerScores]:
    """The layers of which a cut takes more than may go."""
    across = _across(layers)
    units = across.sum(torch.tensor([layer.units for layer in layers])).tolist()
    if all(layer.limit is None or layer.limit >= count for layer, count in zip(layers, units, strict=True)):
        return []
    own = torch.tensor([int(gone.sum()) for _, gone in _apply_cut(layers, cut, dtype)])
    counts = across.sum(own).tolist()
    return [layer for layer, n in zip(layers, counts, strict=True) if layer.limit is not None and n > layer.available]


def select_each(layers: list[LayerScores], totals: dict[str, int]) -> dict[str, torch.Tensor]:
    """`select`, every layer by itself with a total of its own (scope `layer`)."""
    gone: dict[str, torch.Tensor] = {}
    for layer in layers:
        gone.update(select([layer], min(max(totals[layer.name], layer.already), layer.available)))
    return gone


@_one_thread_where_few()
def select_rows(scores: torch.Tensor, total: int, gone: torch.Tensor | None = None) -> torch.Tensor:
    """The lowest scores of every row, the same number in each, exactly `total` in all; what is gone stays so.

    Where `total` is no multiple of the rows, those that lose one more are spread evenly. A row that lost more before
    keeps that, and the others share the rest.

    Args:
        scores: shape (rows, columns).
        total: how many elements are to be gone in all.
        gone: elements gone already, of the same shape.

    Returns:
        A bool tensor of the shape of `scores`.
    """
    rows = len(scores)
    before = torch.zeros(rows, dtype=torch.long) if gone is None else gone.sum(1).cpu()
    total = max(total, int(before.sum()))
    low, high = 0, scores.shape[1]
    while low < high:  # the highest level that all rows can reach
        level = (low + high + 1) // 2
        low, high = (level, high) if int(before.clamp_min(level).sum()) <= total else (low, level - 1)
    counts = before.clamp_min(low)
    more = total - int(counts.sum())
    (level_rows,) = torch.where(before <= low)
    numbers = torch.arange(len(level_rows))
    if more:
        counts[level_rows[(numbers + 1) * more // len(level_rows) > numbers * more // len(level_rows)]] += 1
    chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    step = max(1, CHUNK // max(1, scores.shape[1]))
    for start in range(0, rows, step):
        part = scores[start : start + step]
        if gone is not None:
            part = part.masked_fill(gone[start : start + step], -torch.inf)
        order = part.argsort(dim=1, stable=True)
        wanted = counts[start : start + step, None].to(scores.device)
        goes = torch.arange(scores.shape[1], device=scores.device) < wanted
        chosen[start : start + step].scatter_(1, order, goes)
    return chosen


def pattern_candidates(scores: torch.Tensor, kept: int, group: int, gone: torch.Tensor | None = None) -> torch.Tensor:
    """The elements that an N:M pattern removes: in every group of `group` the lowest, all but `kept`.

    Args:
        scores: any shape, the groups along the last dimension; what is left over at its end forms no group and stays.
        kept: N.
        group: M.
        gone: elements gone already, of the same shape; they are among those removed.

    Returns:
        A bool tensor of the shape of `scores`.
    """
    width = scores.shape[-1] // group * group if scores.ndim else 0
    candidates = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if width == 0:
        return candidates
    rows = scores.reshape(-1, scores.shape[-1])
    flat = candidates.view(-1, scores.shape[-1])
    before = None if gone is None else gone.reshape(-1, scores.shape[-1])
    step = max(1, CHUNK // scores.shape[-1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step, :width].reshape(-1, group)
        if before is not None:
            part = part.masked_fill(before[start : start + step, :width].reshape(-1, group), -torch.inf)
        order = part.argsort(dim=-1, stable=True)[:, : group - kept]
        lowest = torch.zeros_like(part, dtype=torch.bool).scatter_(1, order, True)
        flat[start : start + step, :width] = lowest.view(-1, width)
    return candidates


def _across(layers: list[LayerScores]) -> Across:
    return layers[0].across if layers else ALONE


def _score_dtype(layers: list[LayerScores]) -> torch.dtype:
    with _across(layers).together():
        samples = [layer.scores(0, 1).dtype for layer in layers if layer.units]
    double = _across(layers).sum(torch.tensor([int(torch.float64 in samples)]))
    return torch.float64 if double else torch.float32


def _keys(scores: torch.Tensor, signed: bool) -> torch.Tensor:
    """Integers in the order of the scores: the float's own bits, with those of negative numbers turned round."""
    if signed:
        scores = scores + 0.0  # -0.0 must equal 0.0
    bits = scores.contiguous().view(torch.int32 if scores.dtype == torch.float32 else torch.int64)
    if not signed:
        return bits
    return bits ^ ((bits >> (bits.element_size() * 8 - 1)) & torch.iinfo(bits.dtype).max)


def _checked_keys(scores: torch.Tensor, name: str) -> torch.Tensor:
    """The keys of scores not seen before, after refusing what is not a number."""
    if not scores.numel():
        return _keys(scores, signed=False)
    keys = _keys(scores, signed=False)
    lowest, highest = (int(bound) for bound in keys.aminmax())
    if lowest < 0:  # the sign bit is set somewhere
        keys = _keys(scores, signed=True)
        lowest, highest = (int(bound) for bound in keys.aminmax())
    infinity = 0x7F800000 if keys.dtype == torch.int32 else 0x7FF0000000000000
    if highest > infinity or lowest < -infinity - 1:
        raise ModelError(f"the criterion gave a score that is not a number in '{name}'")
    return keys


def _find_cut(layers: list[LayerScores], wanted: int, dtype: torch.dtype) -> _Cut | None:
    """The score at which exactly `wanted` of the open units lie below, ties aside; None when nothing is wanted."""
    if wanted <= 0:
        return None
    bits = 32 if dtype == torch.float32 else 64
    prefix, rank, across = None, wanted, _across(layers)
    for shift in range(bits - _DIGIT_BITS, -1, -_DIGIT_BITS):
        histogram = torch.zeros(_DIGITS, dtype=torch.int64)
        with across.together():
            for layer in layers:
                for _, _, _, scores in layer.chunks(dtype):
                    # Where the threshold is not negative, negative scores can't lie in its bucket, turned or not.
                    keys = _checked_keys(scores, layer.name) if prefix is None else _keys(scores, signed=prefix <= 0)
                    histogram += _count_digits(keys, shift, prefix).cpu()
        histogram = across.sum(histogram)
        reached = histogram.cumsum(0)
        digit = int(torch.searchsorted(reached, rank))
        if digit >= _DIGITS:
            raise ConfigError(f"pruning.target: only {int(reached[-1])} units are open, {wanted} are wanted")
        rank -= int(reached[digit]) - int(histogram[digit])
        # The first digit carries the sign: its histogram is shifted so that negative keys come first.
        prefix = digit - _DIGITS // 2 if prefix is None else (prefix << _DIGIT_BITS) | digit
    return _Cut(_score_of_key(prefix, dtype), ties=int(histogram[digit]), taken=rank)


def _count_digits(keys: torch.Tensor, shift: int, prefix: int | None) -> torch.Tensor:
    if prefix is None:
        digits = (keys >> shift) + _DIGITS // 2
    else:
        inside = keys[(keys >> (shift + _DIGIT_BITS)) == prefix]
        digits = (inside >> shift) & (_DIGITS - 1)
    return torch.bincount(digits, minlength=_DIGITS)


def _score_of_key(key: int, dtype: torch.dtype) -> float:
    integers = torch.int32 if dtype == torch.float32 else torch.int64
    bits = torch.tensor(key, dtype=integers)
    if key < 0:
        bits = bits ^ torch.iinfo(integers).max
    return float(bits.view(dtype))


def _apply_cut(layers: list[LayerScores], cut: _Cut | None, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """What is gone in each layer after the cut; ties are numbered through all layers and taken evenly."""
    seen, starts = 0, _first_ties(layers, cut, dtype)
    for layer in layers:
        seen = starts.get(layer.name, seen)
        gone, ties = _cut_layer(layer, cut, seen, dtype)
        seen += ties
        yield layer.name, gone


@_one_thread_where_few()
def _cut_layer(layer: LayerScores, cut: _Cut | None, seen: int, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """What is gone in a layer after the cut, and how many ties it holds; `seen` ties came before it."""
    device = layer.scores(0, 1).device if layer.units else "cpu"
    result = torch.zeros(layer.units, dtype=torch.bool, device=device)
    if layer.gone is not None:
        result |= layer.gone
    before = seen
    for start, stop, selectable, scores in layer.chunks(dtype) if cut is not None else ():
        goes, ties = _below(scores, cut, seen)
        seen += ties
        if selectable is None:
            result[start:stop] |= goes
        else:
            result[start:stop][selectable] = goes
    return result, seen - before


def _first_ties(layers: list[LayerScores], cut: _Cut | None, dtype: torch.dtype) -> dict[str, int]:
    """How many ties come before those of each layer in this process; nothing where there is one process alone."""
    across = _across(layers)
    if across.alone or cut is None or cut.taken == cut.ties:
        return {}
    own = torch.tensor(
        [sum(int((scores == cut.threshold).sum()) for *_, scores in layer.chunks(dtype)) for layer in layers]
    )
    totals = across.sum(own)
    starts = totals.cumsum(0) - totals + across.before(own)
    return dict(zip([layer.name for layer in layers], starts.tolist(), strict=True))


def _below(scores: torch.Tensor, cut: _Cut, seen: int) -> tuple[torch.Tensor, int]:
    """Which scores of a chunk go, and how many ties it holds; `seen` ties came before it."""
    if cut.taken == cut.ties:
        return scores <= cut.threshold, 0
    goes = scores < cut.threshold
    (places,) = torch.where(scores == cut.threshold)
    numbers = torch.arange(seen, seen + len(places), device=scores.device)
    taken = (numbers + 1) * cut.taken // cut.ties > numbers * cut.taken // cut.ties
    goes[places[taken]] = True
    return goes, len(places)
