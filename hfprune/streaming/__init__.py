"""Models larger than memory: pruned from files to files, a tensor or a block at a time."""

from hfprune.streaming.prune import StreamReport, prune_checkpoint

__all__ = ["StreamReport", "prune_checkpoint"]
