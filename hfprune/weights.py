"""Which parameters are pruned: the weights of linear maps and convolutions, once each, chosen by patterns."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from hfprune.errors import ConfigError
from hfprune.registry import nearest


@dataclass(frozen=True)
class Weight:
    """A parameter to prune.

    Attributes:
        name: its full name in the model; of a tied parameter the first.
        parameter: the parameter itself.
        input_dim: the dimension that contracts with the layer's input.
    """

    name: str
    parameter: nn.Parameter
    input_dim: int

    def input_last(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view of a tensor of the weight's shape with the input dimension last."""
        return tensor.movedim(self.input_dim, -1)

    def as_matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the weight's shape as a matrix: outputs x (inputs x kernel)."""
        if tensor.ndim < 2:
            return tensor.reshape(1, -1)
        output_dim = 0 if self.input_dim else 1
        return tensor.movedim(output_dim, 0).flatten(1)

    def from_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        """The inverse of `as_matrix`."""
        shape = self.parameter.shape
        if len(shape) < 2:
            return matrix.reshape(shape)
        output_dim = 0 if self.input_dim else 1
        moved = [shape[output_dim], *(n for i, n in enumerate(shape) if i != output_dim)]
        return matrix.reshape(moved).movedim(0, output_dim)


def prunable_weights(
    model: nn.Module, include: Iterable[str] | None = None, ignore: Iterable[str] = ()
) -> dict[str, Weight]:
    """The weights that are pruned, by name, in the model's order; a tied parameter stands once.

    By default these are the matrices and kernels of linear layers, convolutions, recurrent layers and fused attention
    projections. Biases, norms and embeddings (and an output head, which often shares the embedding) are left alone
    unless a pattern of `include` names them with its last part, as `*.bias`, `*.norm1` or `lm_head` do.

    Args:
        model: any module.
        include: glob patterns over module and parameter names; None stands for every weight of the default.
        ignore: glob patterns of what is left alone.

    Raises:
        ConfigError: for a pattern that matches nothing, and where nothing is left to prune.
    """
    ignore = list(ignore)
    owners = _owners(model)
    default = _default_weights(model)
    for key, patterns in (("include", include or ()), ("ignore", ignore)):
        for pattern in patterns:
            check_pattern(model, pattern, f"pruning.{key}")
    chosen: dict[str, Weight] = {}
    for name, parameter in model.named_parameters():
        aliases = owners[id(parameter)]
        if any(_matches(alias, pattern) for alias in aliases for pattern in ignore):
            continue
        if id(parameter) in default:
            if include is None or any(_matches(alias, pattern) for alias in aliases for pattern in include):
                chosen[name] = Weight(name, parameter, default[id(parameter)])
        elif include is not None and any(_names(alias, pattern) for alias in aliases for pattern in include):
            chosen[name] = Weight(name, parameter, _input_dim(model, name, parameter))
    if not chosen and include is None and not ignore:
        kind = type(model).__name__
        raise ConfigError(f"{kind} has no weights of linear maps or convolutions, which leaves nothing to prune")
    if not chosen:
        key, value = ("include", include) if include is not None else ("ignore", ignore)
        raise ConfigError(f"pruning.{key}: {value} leaves nothing to prune")
    return chosen


def check_pattern(model: nn.Module, pattern: str, key: str, names: Iterable[str] | None = None) -> None:
    """Raises a ConfigError that names the nearest module when `pattern` matches nothing.

    Args:
        model: whose module and parameter names count.
        pattern: a glob pattern.
        key: the recipe's key, for the message.
        names: the names that count instead of all the model's.
    """
    if names is None:
        names = [n for n, _ in model.named_modules() if n]
        names += [n for n, _ in model.named_parameters(remove_duplicate=False)]
    names = list(names)
    if not any(_matches(name, pattern) for name in names):
        match = nearest(pattern.strip("*."), {n.removesuffix(".weight") for n in names})
        hint = f"; did you mean '{match}'?" if match else f"; the model has e.g. '{names[0]}'" if names else ""
        raise ConfigError(f"{key}: '{pattern}' matches nothing in the model{hint}")


def pattern_for(name: str, patterns: Iterable[str]) -> str | None:
    """The first of the patterns that matches a parameter name."""
    return next((pattern for pattern in patterns if _matches(name, pattern)), None)


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a parameter, its module or a module around it."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:n]), pattern) for n in range(len(parts), 0, -1))


def _names(name: str, pattern: str) -> bool:
    """Whether a pattern's last part names this very parameter or, for a `weight`, its module; `*` names nothing."""
    last = pattern.rsplit(".", 1)[-1]
    if not last.strip("*?"):
        return False
    module, _, leaf = name.rpartition(".")
    if fnmatch.fnmatchcase(name, pattern) and fnmatch.fnmatchcase(leaf, last):
        return True
    return (
        leaf == "weight" and fnmatch.fnmatchcase(module, pattern) and fnmatch.fnmatchcase(module.split(".")[-1], last)
    )


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Every name of every parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _default_weights(model: nn.Module) -> dict[int, int]:
    """Parameter id to input dimension, for what is pruned unless the patterns say otherwise."""
    found: dict[int, int] = {}
    for module in model.modules():
        found.update((id(parameter), dim) for parameter, dim in _linear_maps(module))
    for module in _embeddings(model):
        for parameter in module.parameters(recurse=False):
            found.pop(id(parameter), None)
    return found


def _linear_maps(module: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """The weights of a module that map its input linearly, each with its input dimension."""
    own = module._parameters
    if isinstance(module, nn.modules.conv._ConvTransposeNd) or is_transposed_linear(module):
        dims = {"weight": 0}
    elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        dims = {"weight": 1}
    elif isinstance(module, nn.MultiheadAttention):
        dims = dict.fromkeys(("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"), 1)
    elif isinstance(module, nn.RNNBase):
        dims = {name: 1 for name in own if name.startswith("weight_")}
    else:
        dims = {}
    for name, dim in dims.items():
        if own.get(name) is not None:
            yield own[name], dim


def layer_weights(model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """The weights of linear layers and convolutions by name, each with its layer and its input dimension.

    A tied weight stands once, under its first name.
    """
    owners: dict[int, tuple[nn.Module, int]] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or is_transposed_linear(module):
            owners.update((id(parameter), (module, dim)) for parameter, dim in _linear_maps(module))
    return {name: owners[id(parameter)] for name, parameter in model.named_parameters() if id(parameter) in owners}


def norm_scales(model: nn.Module) -> set[str]:
    """Names of the weights with which norms scale their channels; a norm is a module whose class says so."""
    return {
        f"{path}.weight" if path else "weight"
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and getattr(module, "weight", None) is not None
        and module.weight.ndim == 1
    }


def is_transposed_linear(module: nn.Module) -> bool:
    """GPT-2's Conv1D, a linear layer whose weight stands inputs x outputs."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def _embeddings(model: nn.Module) -> Iterator[nn.Module]:
    """Embeddings, and the head that a language model calls its output embeddings."""
    yield from (module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag))
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, nn.Module):
        yield head


def _input_dim(model: nn.Module, name: str, parameter: nn.Parameter) -> int:
    """The input dimension of a parameter that only a pattern brought in: that of its layer, else the last."""
    module = model.get_submodule(name.rpartition(".")[0])
    for candidate, dim in _linear_maps(module):
        if candidate is parameter:
            return dim
    return parameter.ndim - 1


def scorable(value: torch.Tensor) -> torch.Tensor:
    """The value in at least single precision: half formats would tie and overflow."""
    return value if value.dtype in (torch.float32, torch.float64) else value.float()
