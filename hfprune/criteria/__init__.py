"""Criteria: what scores importance. Each is one name in a recipe."""

from hfprune.criteria import blocks, gradient, magnitude  # noqa: F401  (their criteria register themselves)
from hfprune.criteria.criterion import Criterion, check_granularity, create, criteria, register_criterion

__all__ = ["Criterion", "check_granularity", "create", "criteria", "register_criterion"]
