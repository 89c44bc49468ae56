"""Analysis: how alike criteria rank, what each layer can lose, and which strategy of pruning wins."""

from hfprune.analysis.agreement import similarity
from hfprune.analysis.chosen import Sensitivity
from hfprune.analysis.comparison import Comparison
from hfprune.analysis.report import Similarity
from hfprune.analysis.tolerance import sensitivity

__all__ = ["Comparison", "Sensitivity", "Similarity", "compare", "sensitivity", "similarity"]


def __getattr__(name: str) -> object:
    # Training is imported only where something is trained.
    if name == "compare":
        from hfprune.analysis.strategies import compare

        return compare
    raise AttributeError(f"module 'hfprune.analysis' has no attribute '{name}'")
