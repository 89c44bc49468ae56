"""Checkpoints: what is written, loaded again and checked."""

from hfprune.checkpoint.load import from_pretrained
from hfprune.checkpoint.merge import merge
from hfprune.checkpoint.metadata import read_block
from hfprune.checkpoint.save import save_pretrained
from hfprune.checkpoint.torch_prune import import_torch_prune
from hfprune.checkpoint.verify import Verification, verify

__all__ = [
    "Verification",
    "from_pretrained",
    "import_torch_prune",
    "merge",
    "read_block",
    "save_pretrained",
    "verify",
]
