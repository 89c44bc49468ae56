"""The graph of a model, from torch.export: what runs on one example, with module and source line of each step."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from hfprune.errors import ModelError
from hfprune.profiling import FORWARD_FAILURES, example_batch

_STATE_OUTPUTS = ("past_key_values", "attentions", "hidden_states", "_outputs", "_model_output", "mems", "cache_params")
_EXPORT_FAILURES = (*FORWARD_FAILURES, NotImplementedError, torch._dynamo.exc.TorchDynamoException)


@dataclass(frozen=True)
class Graph:
    """An exported model.

    Attributes:
        program: what torch.export made of it, for one example.
        inputs: the positional and keyword arguments that it was made with.
        tensors: placeholder name to the parameter or buffer that it stands for.
        names: placeholder name to that tensor's first name in the model.
        unused_parameters: how many parameters the example does not reach.
    """

    program: torch.export.ExportedProgram
    inputs: tuple[tuple, dict[str, Any]]
    tensors: dict[str, torch.Tensor]
    names: dict[str, str]
    unused_parameters: int = 0

    @property
    def nodes(self) -> Any:
        """The steps in order."""
        return self.program.graph.nodes


class MainOutputs(nn.Module):
    """A model that returns only what it is for: predictions where it makes any, without caches and inner states."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        """The tensors that count, in a fixed order."""
        return main_outputs(self.model(*args, **kwargs))


def main_outputs(output: Any) -> list[torch.Tensor]:
    """The floating-point tensors of a model's output that a user looks at.

    Caches, attention maps and the states of inner models are left out; hidden states too where there are predictions.
    """
    if isinstance(output, Mapping):
        kept = {k: v for k, v in output.items() if not any(mark in k for mark in _STATE_OUTPUTS)}
        if any("logits" in key for key in kept):
            kept = {key: value for key, value in kept.items() if not key.endswith("hidden_state")}
        kept = {key: value for key, value in kept.items() if not key.startswith("encoder_")} or kept
        output = list(kept.values())
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def export(model: nn.Module, example_inputs: Any = None) -> Graph:
    """The graph of a model in evaluation mode.

    Args:
        model: any module; it is not changed. On the meta device the graph is made without any values.
        example_inputs: as for `measure`; may be left out for transformers and timm models.

    Raises:
        ModelError: the model can't take the inputs, or torch.export refuses it: the reason, and the line.
    """
    args, kwargs = example_batch(model, example_inputs, 1)
    kwargs = _without_cache(model, kwargs)
    wrapper = MainOutputs(model)
    with evaluating(model), _quiet(), torch.no_grad():
        try:
            program = torch.export.export(wrapper, args, kwargs, strict=False)
        except _EXPORT_FAILURES as error:
            _check_inputs(model, args, kwargs)
            raise ModelError(_refusal(model, error)) from error
    _inline(program.graph_module)
    known = dict(wrapper.named_parameters(remove_duplicate=False)) | dict(wrapper.named_buffers(remove_duplicate=False))
    first = {id(t): n.removeprefix("model.") for n, t in reversed(list(known.items()))}
    signature = program.graph_signature
    places = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    tensors = {place: known[name] for place, name in places.items() if name in known}
    reached = {id(tensor) for tensor in tensors.values()}
    unused = sum(p.numel() for p in model.parameters() if id(p) not in reached)
    return Graph(program, (args, kwargs), tensors, {place: first[id(t)] for place, t in tensors.items()}, unused)


def answer(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The main outputs of a model in evaluation mode; on the meta device their shapes alone.

    Code that looks at values can't run there, but it can be exported.
    """
    with torch.no_grad():
        if not any(parameter.is_meta for parameter in model.parameters()):
            return main_outputs(model(*args, **kwargs))
        with _quiet():
            program = torch.export.export(MainOutputs(model), args, _without_cache(model, kwargs), strict=False)
    (output,) = program.graph.find_nodes(op="output")
    return [node.meta["val"] for node in torch.utils._pytree.tree_leaves(output.args)]


def _inline(module: torch.fx.GraphModule) -> None:
    """Puts the steps of blocks such as `with torch.autocast(...)` into the graph around them."""
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        at = next((i for i, a in enumerate(node.args) if isinstance(a, Node) and a.op == "get_attr"), None)
        inner = getattr(module, node.args[at].target, None) if at is not None else None
        if isinstance(inner, torch.fx.GraphModule):
            _inline(inner)
            with module.graph.inserting_before(node):
                results = _copied(module, inner, node.args[at].target, node.args[at + 1 :])
            for user in list(node.users):
                user.replace_all_uses_with(results[user.args[1]])
                module.graph.erase_node(user)
            module.graph.erase_node(node)


def _copied(module: torch.fx.GraphModule, inner: torch.fx.GraphModule, prefix: str, given: tuple) -> Any:
    """The steps of an inner graph, copied to where `module` inserts; its results."""
    places = [node for node in inner.graph.nodes if node.op == "placeholder"]
    mapping: dict[Node, Any] = dict(zip(places, given, strict=True))
    for step in inner.graph.nodes:
        if step.op == "get_attr":
            name = f"{prefix}_{step.target}".replace(".", "_")
            setattr(module, name, getattr(inner, step.target))
            mapping[step] = module.graph.get_attr(name)
            mapping[step].meta = dict(step.meta)
        elif step.op == "call_function":
            mapping[step] = module.graph.node_copy(step, mapping.__getitem__)
        elif step.op == "output":
            return torch.fx.map_arg(step.args[0], mapping.__getitem__)
    return ()


def module_path(node: Node) -> str:
    """The dotted path of the module that a step belongs to; empty for the model itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return _real_path(stack[-1][0]) if stack else ""


def module_paths(node: Node) -> list[str]:
    """The paths of all modules around a step, the innermost last."""
    return [_real_path(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def _real_path(path: str) -> str:
    """A path without the wrapper's own part and without the mark of a repeated call."""
    path = re.sub(r"@\d+", "", path)
    return path.removeprefix("model.") if path != "model" else ""


def source_line(node: Node) -> str:
    """Where in the model's source a step stands, as `file.py:12: code`; empty where it is not known."""
    lines = (node.meta.get("stack_trace") or "").strip().splitlines()
    places = [i for i, line in enumerate(lines) if line.lstrip().startswith("File ") and "/torch/" not in line]
    if not places:
        return ""
    last = places[-1]
    match = re.search(r'File "(?:.*[/\\])?([^"/\\]+)", line (\d+)', lines[last])
    code = lines[last + 1].strip() if len(lines) > last + 1 else ""
    return f"{match[1]}:{match[2]}: {code}" if match else ""


def operation(node: Node) -> str:
    """The ATen name of a step without overload and in-place mark, e.g. `add`; of a sub-graph the operator's name."""
    packet = getattr(node.target, "overloadpacket", None)
    name = packet.__name__ if packet is not None else getattr(node.target, "__name__", str(node.target))
    return name.rstrip("_") if not name.startswith("__") else name


def _without_cache(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments with the cache switched off where the model's config switches it on."""
    config = getattr(model, "config", None)
    if kwargs and hasattr(config, "get_text_config") and getattr(config.get_text_config(), "use_cache", False):
        return {**kwargs, "use_cache": False}
    return kwargs


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within; every module's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection within: graphs are many small objects that live on, looked through again and again."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """What is there is left out of garbage collections within: libraries ask for full ones, again and again."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch tells every failure on several channels; the exception says it all."""
    before = logging.root.manager.disable
    try:
        logging.disable(logging.CRITICAL)
        silent = io.StringIO()
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(silent),
            contextlib.redirect_stderr(silent),
        ):
            yield
    finally:
        logging.disable(before)


def _check_inputs(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raises where the model itself does not take the inputs: then the graph is not to blame."""
    try:
        model(*args, **kwargs)
    except FORWARD_FAILURES as error:
        shapes = [
            tuple(t.shape) for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        ]
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        name = type(model).__name__
        raise ModelError(f"example_inputs: {name} can't take inputs of the shapes {shapes}: {reason}") from error


def _refusal(model: nn.Module, error: BaseException) -> str:
    """One line: why the graph could not be made, the line in the model, and what still works."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"the structure of {type(model).__name__} can't be analysed: {reason[:200]}{_model_line(error)}; "
        f"masks (granularity weight, N:M, block) still work"
    )


def _model_line(error: BaseException) -> str:
    """The innermost line outside torch in the traceback."""
    place, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if "/torch/" not in code.co_filename and "/hfprune/" not in code.co_filename:
            place = f" ({code.co_filename}:{trace.tb_lineno})"
        trace = trace.tb_next
    return place
