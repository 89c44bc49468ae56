"""Models under torch.nn.utils.prune: their masks, made permanent and recorded."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import prune

from hfprune.checkpoint.foreign import TORCH
from hfprune.checkpoint.metadata import adopt
from hfprune.errors import ModelError
from hfprune.masks import MaskSet


def import_torch_prune(model: nn.Module) -> MaskSet:
    """Makes the masks of torch.nn.utils.prune permanent, in place, and records them as `prune` records its own.

    Each `weight_orig` becomes `weight` again, times its mask; the hooks and buffers are gone. The model then computes
    what it did, and saves, trains and is pruned further as any other. If this raises, the model is unchanged.

    Example:
        >>> torch.nn.utils.prune.l1_unstructured(model.fc, "weight", amount=0.5)
        >>> masks = hfprune.import_torch_prune(model)
        >>> hfprune.save_pretrained(model, "sparse", sparse="bitmask")

    Args:
        model: with modules that torch.nn.utils.prune has pruned.

    Returns:
        The masks; `masks.enforce()` after an optimizer step keeps what they hold at zero.

    Raises:
        ModelError: nothing of the model is under torch.nn.utils.prune, or a pruned weight is shared with one that is
            not pruned alike.
    """
    names = masked_by_torch(model)
    if not names:
        raise ModelError("nothing of the model is under torch.nn.utils.prune: there are no masks to import")
    kept = {name: _tensor(model, f"{name}_mask").detach() != 0 for name in names}
    _check_shared(model, kept)
    for name in names:
        owner, _, leaf = name.rpartition(".")
        prune.remove(model.get_submodule(owner), leaf)
    own = {name for name, _ in model.named_parameters()}  # a shared parameter under its first name
    # The product with a mask may be -0.0, or no number where the weight was infinite.
    masks = MaskSet({name: mask for name, mask in kept.items() if name in own}).apply(model)
    adopt(model, TORCH, masks)
    return masks


def masked_by_torch(model: nn.Module) -> list[str]:
    """The names of the parameters that torch.nn.utils.prune masks, as they were before it did."""
    return [
        f"{path}.{hook._tensor_name}" if path else hook._tensor_name
        for path, module in model.named_modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, prune.BasePruningMethod)
    ]


def refuse_torch_prune(model: nn.Module) -> None:
    """Raises a ModelError for a model whose masks of torch.nn.utils.prune are not permanent yet."""
    if names := masked_by_torch(model):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ModelError(
            f"the model is under torch.nn.utils.prune ('{names[0]}'{more}); "
            "hfprune.import_torch_prune(model) makes its masks permanent"
        )


def _check_shared(model: nn.Module, kept: dict[str, torch.Tensor]) -> None:
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name.removesuffix("_orig"))
    for name in kept:
        for other in users[id(_tensor(model, f"{name}_orig"))]:
            if other not in kept or not torch.equal(kept[other], kept[name]):
                raise ModelError(f"'{name}' is masked and shares its values with '{other}', which is not masked alike")


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)
