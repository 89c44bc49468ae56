"""Analysis: how alike criteria rank, whether they tell units apart, and what each layer can lose."""

from hfprune.analysis.agreement import similarity
from hfprune.analysis.chosen import Sensitivity
from hfprune.analysis.report import Similarity
from hfprune.analysis.tolerance import sensitivity

__all__ = ["Sensitivity", "Similarity", "sensitivity", "similarity"]
