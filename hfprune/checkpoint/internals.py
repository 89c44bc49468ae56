"""The one place that uses what transformers keeps to itself: how it renames tensors, and how it builds skeletons."""

from __future__ import annotations

import re
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch

from hfprune.errors import CheckpointError


def as_loaded(model: Any, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], set[str]]:
    """The tensors of a checkpoint under the names, and joined or split in the way, that `from_pretrained` gives them.

    Args:
        model: a PreTrainedModel, whose names decide about prefixes.
        tensors: of the checkpoint; on the meta device their shapes alone are worked out.

    Returns:
        What the model takes, and the names (as far as they could be translated) of what it does not.

    Raises:
        CheckpointError: the tensors can't be joined as the model needs them.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    converters = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known = model.state_dict()
    jobs: dict[str, Any] = {}
    unknown = set()
    for original, (name, pattern) in names_as_loaded(model, tensors).items():
        if name not in known:
            unknown.add(name)
        elif pattern is not None:
            job = jobs.setdefault(name, deepcopy(by_pattern[pattern]))
            job.add_tensor(name, original, pattern, tensors[original])
        else:
            job = jobs.setdefault(name, WeightRenaming(original, name))
            job.add_tensor(name, original, original, tensors[original])
    found: dict[str, torch.Tensor] = {}
    for name, job in jobs.items():
        try:
            converted = job.convert(name, model=model, config=model.config)
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"'{name}' can't be put together from its parts: {_line(error)}") from error
        found |= {key: value[0] if isinstance(value, list) else value for key, value in converted.items()}
    return found, unknown


def names_as_loaded(model: Any, names: Iterable[str]) -> dict[str, tuple[str, str | None]]:
    """The model's names of a checkpoint's tensors, in the order in which `from_pretrained` takes these.

    Args:
        model: a PreTrainedModel, whose names decide about prefixes.
        names: those of the checkpoint.

    Returns:
        For each its name in the model, and for those that are joined or split the pattern that says so, else None. A
        name that the model does not have is translated as far as can be.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, known = model.base_model_prefix, model.state_dict()
    found = {}
    for original in sorted(names, key=dot_natural_key):
        name, pattern = rename_source_key(original, renamings, converters, prefix, known)
        if name not in known and original in known:
            name, pattern = rename_source_key(original, [], [], base_model_prefix=prefix, meta_state_dict=known)
        found[original] = name, pattern
    return found


def joined(model: Any, names: Iterable[str]) -> list[str]:
    """Those of a checkpoint's tensors that loading this model joins or splits, and not only renames."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    if not converters:
        return []
    return [name for name in names if rename_source_key(name, renamings, converters)[1] is not None]


def joins_tensors(model: Any) -> bool:
    """Whether loading this model does more with some of its tensors than rename them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    return any(isinstance(entry, WeightConverter) for entry in get_model_conversion_mapping(model))


def skeleton(kind: type, config: Any, dtype: torch.dtype = torch.float32, with_buffers: bool = False) -> Any:
    """A transformers model on the meta device, built just as `from_pretrained` builds it.

    Args:
        kind: its class.
        config: its config.
        dtype: of its tensors, where the code names none.
        with_buffers: whether its buffers have values, as those need them that no file holds.

    Raises:
        CheckpointError: the class can't be built from this config.
    """
    from transformers.utils.generic import ContextManagers

    contexts = kind.get_init_context(dtype, False, False, None)
    if with_buffers:
        from accelerate import init_empty_weights

        contexts = [context for context in contexts if not isinstance(context, torch.device)]
        contexts.append(init_empty_weights(include_buffers=False))
    try:
        with ContextManagers(contexts):
            return kind(config)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        AssertionError,
        KeyError,
        IndexError,
        AttributeError,
        ZeroDivisionError,
        NotImplementedError,
    ) as error:
        raise CheckpointError(f"{kind.__name__} can't be built from its config: {_line(error)}") from error


def forgivable(model: Any, missing: set[str], unexpected: set[str]) -> tuple[set[str], set[str]]:
    """Missing and unexpected tensors without those that the model's class says to ignore."""
    skip_missing = model._keys_to_ignore_on_load_missing or ()
    # Buffers that older versions of transformers wrote down and newer ones compute.
    skip_unexpected = [
        *(model._keys_to_ignore_on_load_unexpected or ()),
        r"rotary_emb\.inv_freq",
        r"(^|\.)position_ids$",
    ]
    return (
        {name for name in missing if not any(re.search(pattern, name) for pattern in skip_missing)},
        {name for name in unexpected if not any(re.search(pattern, name) for pattern in skip_unexpected)},
    )


def find_ties_again(model: Any) -> None:
    """Brings the list of tied tensors into line with the names that are left."""
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
