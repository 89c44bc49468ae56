"""A small modeling file for those who have no hfprune: `trust_remote_code=True`, torch and transformers are enough."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from pprint import pformat
from typing import Any

import hfprune
from hfprune.checkpoint.configs import config_values, dense_values
from hfprune.checkpoint.internals import skeleton
from hfprune.checkpoint.metadata import plan_of
from hfprune.checkpoint.rebuild import Rebuild, fitted
from hfprune.checkpoint.uniform import numbers
from hfprune.errors import CheckpointError
from hfprune.lowrank.factor import factored_layers

MODULE = "modeling_hfprune"

_HEAD = '''\
"""A pruned model: a class of transformers whose parts are as small as this checkpoint's tensors.

Written by hfprune {version} with transformers {transformers}. Needs torch and transformers, and no hfprune.
"""

import copy

import torch
import transformers
from torch import nn
from transformers import conversion_mapping

# The blocks that are gone, in the dense model's numbering; the shapes of the tensors that were cut; the numbers that
# modules keep beside their tensors; what is kept of buffers that no file holds; the config of both models.
DROPPED = {dropped}
SHAPES = {shapes}
NUMBERS = {numbers}
BUFFERS = {buffers}
DENSE = {dense}
SMALL = {small}

# transformers renames tensors while loading for classes of its own, and for those that are named here.
for _name in {registered}:
    if (_mapping := conversion_mapping.get_checkpoint_conversion_mapping(_name)) is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(_name, _mapping, overwrite=True)


def say(config, values, other):
    for key in [*values, *other]:
        *path, name = key.split(".")
        owner = config
        for part in path:
            owner = getattr(owner, part)
        if key in values:
            setattr(owner, name, values[key])
        else:
            vars(owner).pop(name, None)


def under(entries, prefix):
    """The entries of one part of the model, by their paths inside it."""
    return {{path[len(prefix) :]: entries[path] for path in entries if path.startswith(prefix)}}


def drop(model, prefix):
    for path in sorted(under(dict.fromkeys(DROPPED), prefix), key=lambda path: -int(path.rpartition(".")[2])):
        parent, _, key = path.rpartition(".")
        blocks = model.get_submodule(parent)._modules
        kept = [block for name, block in blocks.items() if name != key]
        blocks.clear()
        blocks.update({{str(position): block for position, block in enumerate(kept)}})


{factoring}def resize(model, prefix):
    new = {{}}
    for name, shape in under(SHAPES, prefix).items():
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        old = getattr(owner, leaf)
        if id(old) not in new:
            value = torch.empty(shape, dtype=old.dtype, device=old.device)
            new[id(old)] = (nn.Parameter(value) if isinstance(old, nn.Parameter) else value, old)
        setattr(owner, leaf, new[id(old)][0])


def number(model, prefix):
    """Sets the small model's numbers, and returns the dense model's."""
    dense = {{}}
    for path, values in under(NUMBERS, prefix).items():
        module = model.get_submodule(path.rstrip("."))
        if any(name.startswith("config.") for name in values):
            module.config = copy.copy(module.config)
        places = {{n: (module.config, n[7:]) if n.startswith("config.") else (module, n) for n in values}}
        dense[path] = {{name: getattr(*place) for name, place in places.items()}}
        for name, value in values.items():
            setattr(*places[name], value)
    return dense


class Pruned:
    """Cuts what the dense class has built; the class that it is mixed into says which part of the model it is."""

    hfprune_cuts_itself = True
    prefix = ""

    def __init__(self, config, *args, **kwargs):
        say(config, DENSE, SMALL)
        super().__init__(config, *args, **kwargs)
        drop(self, self.prefix)
{factor}        resize(self, self.prefix)
        if DROPPED:
            self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
        self._finish()

    def _finish(self):
        self._dense_numbers = number(self, self.prefix)
        say(self.config, SMALL, DENSE)
        # On the meta device the values of buffers are still to come, and follow from the dense model's facts.
        self._to_compute = any(value.is_meta for value in self.buffers())
        if self._to_compute:
            return
        for path, cut in under(BUFFERS, self.prefix).items():
            parent, _, leaf = path.rpartition(".")
            owner = self.get_submodule(parent)
            value = owner._buffers[leaf]
            for dim, kept in cut.items():
                value = value.index_select(dim, torch.tensor(kept, device=value.device))
            owner._buffers[leaf] = value

    def initialize_weights(self):
        """transformers computes the buffers that no file holds, once the tensors are loaded."""
        if not getattr(self, "_to_compute", False):
            return super().initialize_weights()
        say(self.config, DENSE, SMALL)
        for path, values in self._dense_numbers.items():
            vars(self.get_submodule(path.rstrip("."))).update(values)
        super().initialize_weights()
        self._finish()
'''

_FACTORING = '''\
# The ranks of the layers whose weight is a product of two.
FACTORED = {ranks}


class Factored(nn.Module):
    """A linear layer or convolution in two: from the inputs to its components, and on to the outputs."""

    def __init__(self, layer, rank):
        super().__init__()
        self.transposed = type(layer).__name__ == "Conv1D"
        self.register_buffer("weight", layer.weight.detach().new_zeros(1))
        outputs, inputs = layer.weight.shape[:2][:: -1 if self.transposed else 1]
        like = {{"dtype": layer.weight.dtype, "device": layer.weight.device}}
        if isinstance(layer, nn.modules.conv._ConvNd):
            where = {{name: getattr(layer, name) for name in ("stride", "padding", "dilation", "padding_mode")}}
            self.factor_in = type(layer)(inputs, rank, layer.kernel_size, bias=False, **where, **like)
            self.factor_out = type(layer)(rank, outputs, 1, bias=layer.bias is not None, **like)
        else:
            self.factor_in = nn.Linear(inputs, rank, bias=False, **like)
            self.factor_out = nn.Linear(rank, outputs, bias=layer.bias is not None, **like)

    def forward(self, x):
        return self.factor_out(self.factor_in(x))

    @property
    def bias(self):
        return self.factor_out.bias


def factor(model, prefix):
    for path, rank in under(FACTORED, prefix).items():
        parent, _, leaf = path.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, leaf, Factored(getattr(owner, leaf), rank))


'''

_CLASS = """

class {name}(Pruned, transformers.{name}):
    prefix = "{prefix}"
"""


def add_remote_code(model: Any, folder: Path) -> None:
    """Writes the modeling file beside a checkpoint, and names it in its config.json.

    Args:
        model: an uneven transformers model, as it was saved.
        folder: where it was saved.

    Raises:
        CheckpointError: the model's class is not transformers' own, so that a file alone can't say how to build it.
    """
    kinds = _classes(model)
    (folder / f"{MODULE}.py").write_text(_source(model, kinds), encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {auto: f"{MODULE}.{name}" for name, (_, autos) in kinds.items() for auto in autos}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _classes(model: Any) -> dict[str, tuple[str, list[str]]]:
    """The classes to write: name → its path in the model with a dot, and the auto classes that load it."""
    import transformers

    kind = type(model)
    if getattr(transformers, kind.__name__, None) is not kind:
        raise CheckpointError(
            f"remote_code: {kind.__name__} is no class of transformers, which the file would build on"
        )
    found = {kind.__name__: ("", auto_classes(model.config.model_type, kind.__name__))}
    backbone = getattr(model, model.base_model_prefix, None)
    name = type(backbone).__name__
    if "AutoModel" in auto_classes(model.config.model_type, name) and name not in found:
        found[name] = (f"{model.base_model_prefix}.", ["AutoModel"])
    return found


def auto_classes(model_type: str, name: str) -> list[str]:
    """The names of transformers' auto classes that load a class, in alphabetical order."""
    from transformers.models.auto import modeling_auto

    autos = []
    for auto, kind in sorted(vars(modeling_auto).items()):
        mapping = getattr(getattr(kind, "_model_mapping", None), "_model_mapping", {})
        if (
            auto.startswith("AutoModel")
            and not auto.startswith("AutoModelWith")
            and name in _names(mapping, model_type)
        ):
            autos.append(auto)
    return autos


def _names(mapping: dict[str, Any], model_type: str) -> tuple[str, ...]:
    names = mapping.get(model_type, ())
    return (names,) if isinstance(names, str) else tuple(names)


def _source(model: Any, kinds: dict[str, tuple[str, list[str]]]) -> str:
    import transformers

    config = copy.deepcopy(model.config)
    dense_values(config, plan_of(model))
    dense = skeleton(type(model), config)
    plan = fitted(plan_of(model), dense, model.base_model_prefix)
    before = {id(module): numbers(module) for module in dense.modules()}
    steps = Rebuild(dense, plan)
    steps.drop()
    steps.factor()
    factored = {p: layer.rank for p, layer in factored_layers(dense).items()}
    before |= {id(module): numbers(module) for module in dense.modules() if id(module) not in before}
    changed: dict[str, Any] = {}
    for path, module in dense.named_modules():
        now = numbers(model.get_submodule(path))
        new = {name: value for name, value in now.items() if before[id(module)].get(name, value) != value}
        if new:
            changed[f"{path}." if path else ""] = new
    small, state = model.state_dict(), dense.state_dict()
    shapes = {n: tuple(v.shape) for n, v in small.items() if v.shape != state[n].shape}
    text = _HEAD.format(
        version=hfprune.__version__,
        transformers=transformers.__version__,
        dropped=_literal(sorted(plan.dropped)),
        factoring=_FACTORING.format(ranks=_literal(factored)) if factored else "",
        factor="        factor(self, self.prefix)\n" if factored else "",
        shapes=_literal(shapes),
        numbers=_literal(changed),
        buffers=_literal(plan.buffers),
        dense=_literal(plan.dense_config or {}),
        small=_literal(config_values(model.config, plan.config)),
        registered=_literal([*kinds, model.config.model_type]),
    )
    return text + "".join(_CLASS.format(name=name, prefix=prefix) for name, (prefix, _) in kinds.items())


def _literal(value: Any) -> str:
    return pformat(value, width=116, sort_dicts=True)
