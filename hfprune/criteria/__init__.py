"""Criteria: what scores importance. Each is one name in a recipe."""

from hfprune.criteria import (  # noqa: F401  (their criteria register themselves)
    activation,
    blocks,
    components,
    curvature,
    geometry,
    gradient,
    layerwise,
    magnitude,
    sparsegpt,
)
from hfprune.criteria.criterion import Criterion, check_granularity, create, criteria, register_criterion

__all__ = ["Criterion", "check_granularity", "create", "criteria", "register_criterion"]
