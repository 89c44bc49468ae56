"""Which way a smaller model is saved: as a stock checkpoint where the stock class builds just it, else for hfprune."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from hfprune.checkpoint.configs import config_values, set_config
from hfprune.checkpoint.internals import as_loaded, joins_tensors, skeleton
from hfprune.checkpoint.metadata import MARKER, block_of, plan_of, saved_tensors
from hfprune.checkpoint.plugin import cut, cuts_itself, dense_config
from hfprune.checkpoint.readers import is_read
from hfprune.checkpoint.uniform_values import try_values, uniform_values
from hfprune.errors import CheckpointError
from hfprune.structure.plan import Plan


def choose_route(model: nn.Module) -> bool:
    """Brings the config of a transformers model that carries a plan into line with it.

    The config gets the small model's values and, unless the stock class builds exactly this model from them, the mark
    that makes `from_pretrained` ask hfprune. Other modules are left as they are.

    Returns:
        Whether the model is uniform: a stock checkpoint.

    Raises:
        CheckpointError: the config does not have what the plan changes.
    """
    from transformers import PreTrainedModel

    plan = plan_of(model)
    if plan is None or not isinstance(model, PreTrainedModel) or cuts_itself(model):
        return False
    config = model.config
    method = getattr(config, "quantization_config", None)
    if method is not None and dict(method).get("quant_method") != MARKER["quant_method"]:
        raise CheckpointError("a quantized model can't be saved pruned: quantize it after pruning")
    if plan.config and plan.dense_config is None:  # nothing is changed yet: the config still says the dense model's
        plan.dense_config = config_values(config, plan.config)
    set_config(config, plan.config)
    uniform = is_uniform(model, plan) or _find_uniform(model, plan)
    block_of(model)["plan"] = plan.to_dict()
    if uniform and method is not None:
        del config.quantization_config
    elif not uniform:
        config.quantization_config = dict(MARKER)
    return uniform


def _find_uniform(model: Any, plan: Plan) -> bool:
    """Looks for config values from which the stock class builds this model; the plan and the config keep them."""
    if plan.buffers:
        return False
    for values in uniform_values(model, model.config):
        try:
            had = try_values(model, values)
        except CheckpointError:
            continue
        if is_uniform(model, plan):
            plan.config |= values
            plan.dense_config = had | (plan.dense_config or {})
            return True
        set_config(model.config, had, remove=values.keys() - had.keys())
    return False


def is_uniform(model: Any, plan: Plan) -> bool:
    """Whether the stock class builds exactly this model from its config: every module, shape and number that counts."""
    # Buffers that were cut hold what the stock class would compute otherwise, such as rotary frequencies.
    if plan.buffers:
        return False
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        return difference(skeleton(type(model), config), model) is None
    except CheckpointError:
        return False


def check_loads(model: Any) -> None:
    """Goes the way of `from_pretrained` with shapes alone, to refuse what would not load again.

    Raises:
        CheckpointError: the model does not load again, with the reason.
    """
    if cuts_itself(model):
        return
    plan = plan_of(model)
    try:
        config = dense_config(copy.deepcopy(model.config))
        config.architectures = [type(model).__name__]
        again = skeleton(type(model), config)
        tensors = _as_in_the_file(model)
        steps = cut(again, plan, {name: tuple(value.shape) for name, value in tensors.items()})
        changed = steps.finish()
        found = difference(again, model, {id(module) for module in changed})
        if found is None and joins_tensors(model):
            found = _lost_on_the_way(again, model, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"the pruned {type(model).__name__} would not load again: {error}") from error
    if found is not None:
        raise CheckpointError(f"the pruned {type(model).__name__} would not load again: {found}")


def _as_in_the_file(model: Any) -> dict[str, torch.Tensor]:
    """The tensors as `save_pretrained` writes them: renamed, and tied ones once."""
    state = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    for target, source in model.all_tied_weights_keys.items():
        if target in state and source in state and state[target].data_ptr() == state[source].data_ptr():
            del state[target]
    try:
        return saved_tensors(model, state)
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"its tensors can't be split as its files need it: {error}") from error


def _lost_on_the_way(built: Any, model: Any, tensors: dict[str, torch.Tensor]) -> str | None:
    """The first tensor that is another one after being split for the file and joined again."""
    again, _ = as_loaded(built, tensors)
    for name, value in model.state_dict().items():
        if name in again and not torch.equal(again[name], value):
            return f"'{name}' changes when it is split for the file and joined again"
    return None


def difference(built: nn.Module, model: nn.Module, touched: set[int] | None = None) -> str | None:
    """How a module that was built again differs from the one it stands for, in one line; None if it does not.

    Args:
        built: may lie on the meta device.
        model: what it is compared with.
        touched: ids of the modules in `built` whose numbers are compared; by default all, with the numbers that any
            code reads.
    """
    left, right = dict(built.named_modules()), dict(model.named_modules())
    # By name: a parametrized module has a class of its own.
    kinds = [{p: (type(m).__module__, type(m).__qualname__) for p, m in one.items()} for one in (left, right)]
    for path in sorted(left.keys() | right.keys()):
        if kinds[0].get(path) != kinds[1].get(path):
            return f"the module '{path}' is of another kind, or is there only once"
    for path, module in left.items():
        for kind in ("_parameters", "_buffers"):
            # Buffers that no file holds may grow while the model runs; those that were cut stand in the plan.
            shapes = [
                {
                    name: None if value is None else value.shape
                    for name, value in getattr(one, kind).items()
                    if kind == "_parameters" or name not in one._non_persistent_buffers_set
                }
                for one in (module, right[path])
            ]
            if shapes[0] != shapes[1]:
                return f"the tensors of '{path}' have the shapes {shapes[1]} and would have {shapes[0]}"
        if touched is None or id(module) in touched:
            built_says, model_says = numbers(module), numbers(right[path])
            for name in sorted(built_says.keys() | model_says.keys()):
                counts = touched is not None or is_read(type(module), name)
                if counts and built_says.get(name) != model_says.get(name):
                    return f"{path}.{name} is {model_says.get(name)} and would be {built_says.get(name)}"
    return None


def numbers(module: nn.Module) -> dict[str, Any]:
    """The numbers, and rows of numbers, that a module keeps beside its tensors; rows as tuples."""
    found = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(module).items()}
    return {
        name: value
        for name, value in found.items()
        if type(value) in (int, float)
        or (isinstance(value, tuple) and value and all(type(item) in (int, float) for item in value))
    }
