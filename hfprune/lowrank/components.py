"""A weight as a sum of components, each scored: what factoring keeps the leading ones of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hfprune.criteria.criterion import Criterion
from hfprune.criteria.layers import Layer
from hfprune.errors import ModelError
from hfprune.weights import Weight, scorable


@dataclass(frozen=True)
class Components:
    """The components of one weight, the most important first.

    Attributes:
        left: outputs x components.
        right: components x inputs, in the order of `criteria.layers.Layer`; the weight is `left @ right`, as far as
            components are held.
        scores: importance, of all components, also of those that `left` and `right` no longer hold.
    """

    left: torch.Tensor
    right: torch.Tensor
    scores: torch.Tensor


def components_of(
    criterion: Criterion,
    name: str,
    module: nn.Module,
    statistics: Sequence[torch.Tensor] = (),
    normalize: str = "none",
    most: int | None = None,
) -> Components:
    """Takes the weight of a dense layer apart: W = U diag(σ) Vᵀ.

    With `whitening` it is W S = U diag(σ) Vᵀ, S a root of the inputs' second moment, and Vᵀ S⁻¹ stands for Vᵀ. Both
    factors of a component get the same norm.

    Args:
        criterion: scores the components by σ and, where it asks for them, the gradients ∂L/∂σ = uᵀ (∂L/∂W) v.
        name: the weight's.
        module: a layer that can be factored.
        statistics: the weight's, of the criterion.
        normalize: what scores are divided by: `mean`, `max` or `none`.
        most: how many leading components are held; by default all.

    Raises:
        ModelError: the weight or its scores are not finite.
    """
    input_dim = 1 if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) else 0
    layer = Layer(Weight(name, module.weight, input_dim), module)
    matrix = scorable(layer.to_matrices(module.weight.detach())[0])
    if not torch.isfinite(matrix).all():
        raise ModelError(f"'{name}' holds values that are not finite: it can't be factored")
    whitens = "input_moment" in criterion.statistics
    root = _root(statistics[0], criterion.damping, name).to(matrix.dtype) if whitens else None
    left, values, right = torch.linalg.svd(matrix if root is None else matrix @ root, full_matrices=False)
    if root is not None:
        right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
    gradients = () if whitens else tuple(_along(layer.to_matrices(g)[0], left, right) for g in statistics)
    scores = criterion.finish(criterion.terms(name, values, *gradients))
    if not torch.isfinite(scores).all():
        raise ModelError(f"pruning.criterion: '{criterion.name}' gave scores that are not finite in '{name}'")
    order = torch.sort(scores, descending=True, stable=True).indices
    scale = {"mean": scores.mean(), "max": scores.max(), "none": torch.ones(())}[normalize]
    kept = order[:most]
    # Both factors of a component are equally long, so that training moves both alike.
    length = right[kept].norm(dim=1).clamp_min(1e-30)
    stretch = (values[kept] / length).sqrt()
    return Components(
        left[:, kept] * (stretch * length), right[kept] * stretch[:, None], scores[order] / scale.clamp_min(1e-30)
    )


def _along(gradient: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """uᵀ G v for every component: the derivative by its singular value."""
    return ((left.t() @ gradient.to(left.dtype)) * right).sum(1)


def _root(moment: torch.Tensor, damping: float, name: str) -> torch.Tensor:
    """A lower triangular S with S Sᵀ = the moment, damped."""
    moment = moment.double()
    for _ in range(6):
        damped = moment + damping * moment.diagonal().mean() * torch.eye(len(moment), device=moment.device)
        root, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return root
        damping *= 10
    raise ModelError(f"pruning.criterion: the inputs of '{name}' have no usable second moment; use more data")
