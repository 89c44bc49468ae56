"""Criteria of whole blocks: block_influence."""

from __future__ import annotations

from hfprune.criteria.criterion import Criterion, register_criterion


@register_criterion("block_influence")
class BlockInfluence(Criterion):
    """1 - cos(hidden in, hidden out) of a residual block, over calibration batches (ShortGPT, arXiv 2403.03853).

    It scores blocks, not weights: for granularity `layer`.
    """

    of_blocks = True
