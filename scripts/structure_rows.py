"""One row of a table of bench_structure.py: what a process of its own finds out about one model."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import transformers
from structure_models import all_models, stirred
from torch import nn

import hfprune
from hfprune import PruningConfig
from hfprune.profiling import example_batch
from hfprune.structure.graph import main_outputs
from hfprune.structure.groups import analyse

TOLERANCE = 0.02


@dataclass
class Row:
    """What came out.

    Attributes:
        ok: whether it is what was asked for.
        cells: column to text.
        reason: where it is not: why; otherwise what could not be cut.
    """

    ok: bool = True
    cells: dict[str, str] = field(default_factory=dict)
    reason: str = ""

    def fail(self, reason: str) -> None:
        """Notes the first thing that is wrong."""
        self.ok, self.reason = False, reason if self.ok else self.reason

    def remark(self, text: str) -> None:
        """Something worth knowing about a row that is good."""
        self.reason = self.reason or " ".join(text.split())[:200]


def outputs_of(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    """The tensors that a user looks at."""
    args, kwargs = (), {}
    if isinstance(inputs, dict):
        kwargs = inputs
    else:
        args = inputs
    with torch.no_grad():
        return main_outputs(model(*args, **kwargs))


def _same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def _macs(model: nn.Module, inputs: Any) -> int:
    return hfprune.measure(model, inputs, latency=False).macs or 0


def _compare_reloaded(row: Row, model: nn.Module, again: nn.Module, inputs: Any) -> None:
    """The same numbers to the last bit, once the weights of both lie alike in memory: torch's kernels round otherwise
    where a tensor is mapped from a file at an odd address."""
    again = copy.deepcopy(again)
    found = outputs_of(model, inputs)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in found):
        row.fail("its outputs are not finite")
    if not any(tensor.std() > 0 for tensor in found):
        row.fail("its outputs are constant")
    if not _same(found, outputs_of(again, inputs)):
        row.fail("the loaded model answers otherwise")


def timm_model(name: str) -> nn.Module:
    """A timm model with weights drawn anew, and a classifier even where its own weights come without one."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    model = stirred((model if model.num_classes else timm.create_model(name, num_classes=1000)).eval())
    (image,), _ = example_batch(model)
    settle(model, torch.randn(2, *image.shape[1:], generator=torch.Generator().manual_seed(1)))
    return model


def settle(model: nn.Module, images: torch.Tensor) -> None:
    """Gives BatchNorm statistics of its own inputs, so that no number grows from layer to layer."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 0.5
    if norms:
        with torch.no_grad():
            model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum


def timm_row(name: str) -> Row:
    """A timm model at half its multiply-accumulates, proved, saved and loaded."""
    model = timm_model(name)
    inputs, _ = example_batch(model)
    before, params = _macs(model, inputs), sum(p.numel() for p in model.parameters())
    row = Row(cells={"params": f"{params / 1e6:.2f} M", "MACs": f"{before / 1e9:.3f} G"})
    began = time.perf_counter()
    report = hfprune.prune(model, PruningConfig(granularity="channel", target={"macs": 0.5}), example_inputs=inputs)
    row.cells["seconds"] = f"{time.perf_counter() - began:.1f}"
    after = _macs(model, inputs)
    row.cells["reached"] = f"{after / before:.1%}"
    cut = sum(after < units for units, after in report.groups.values())
    row.cells["groups cut"] = f"{cut} of {len(report.groups)}"
    if abs(after / before - (1 - report.achieved)) > TOLERANCE / 2:
        row.fail(f"the report says {report.achieved:.1%} of the MACs are gone, counted are {1 - after / before:.1%}")
    if abs(after / before - 0.5) > TOLERANCE * 0.5:
        row.fail(f"{after / before:.1%} of the MACs are left: {report.note}")
    row.remark(report.note)
    with tempfile.TemporaryDirectory() as folder:
        hfprune.save_pretrained(model, folder)
        _compare_reloaded(row, model, hfprune.from_pretrained(folder).eval(), inputs)
    return row


def transformers_row(name: str) -> Row:
    """A tiny transformers model at half its heads and neurons, proved, saved and loaded by its own class."""
    tiny = all_models()[name]
    model = tiny.build()
    inputs = dict(tiny.inputs)
    wanted = {"head": tiny.heads, "neuron": tiny.neurons}
    kinds = [kind for kind, count in wanted.items() if count] or ["channel"]
    row = Row(cells={"class": tiny.model, "params": f"{sum(p.numel() for p in model.parameters()):,}"})
    kind_of = {name: group.kind for name, group in analyse(model, inputs).groups.items()}
    began = time.perf_counter()
    config = PruningConfig(granularity=kinds, target=0.5, scope="layer", round_to=1)
    report = hfprune.prune(model, config, example_inputs=inputs)
    row.cells["seconds"] = f"{time.perf_counter() - began:.1f}"
    for kind in kinds:
        halved = [sizes for name, sizes in report.groups.items() if kind in (kind_of[name], "channel")]
        halved = [(before, after) for before, after in halved if abs(after - before / 2) < 1]
        before, after = (sum(sizes[side] for sizes in halved) for side in (0, 1))
        row.cells[f"{kind}s"] = f"{before} -> {after}"
        if before != wanted.get(kind, report.units):
            row.fail(f"{before} {kind}s are halved, not {wanted.get(kind, report.units)}")
    with tempfile.TemporaryDirectory() as folder:
        hfprune.save_pretrained(model, folder)
        again = type(model).from_pretrained(folder).eval()
        _compare_reloaded(row, model, again, inputs)
    if tiny.generates:
        row.cells["generates"] = _generates(row, again, inputs)
    return row


def _generates(row: Row, model: nn.Module, inputs: dict[str, Any]) -> str:
    """Five new tokens with the cache and without it."""
    given = {name: value for name, value in inputs.items() if not name.startswith("decoder")}
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        cached, plain = (model.generate(**given, **settings, use_cache=use) for use in (True, False))
    if not torch.equal(cached, plain):
        row.fail("generates other tokens with the cache than without")
        return "differs"
    return "yes"


@dataclass(frozen=True)
class Check:
    """A model whose size at half of all units is known.

    Attributes:
        build: makes it.
        inputs: what it takes.
        keep: patterns of what stays.
        params, macs: before and after, in millions and in billions by `plain_macs`; None where nothing is known.
    """

    build: Callable[[], nn.Module]
    inputs: Any
    keep: tuple[str, ...]
    params: tuple[float, float]
    macs: tuple[float, float] | None = None


def _resnet18() -> nn.Module:
    import torchvision

    return torchvision.models.resnet18()


def vit_base() -> nn.Module:
    """ViT-B/16 with 1000 classes, as transformers has it."""
    return transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000))


def _bert_base() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig())


IMAGE = (torch.zeros(1, 3, 224, 224),)
PIXELS = {"pixel_values": torch.zeros(1, 3, 224, 224)}
CHECKS = {
    "torchvision ResNet-18": Check(_resnet18, IMAGE, (), (11.690, 3.056), (1.822, 0.487)),
    "transformers ViT-B/16": Check(vit_base, PIXELS, (), (86.57, 22.05), (16.86, 4.25)),
    "transformers BERT-base": Check(
        _bert_base, {"input_ids": torch.ones(1, 128, dtype=torch.long)}, (), (109.48, 33.4)
    ),
}


def check_row(name: str) -> Row:
    """Half of all units of every group, the classifier kept."""
    check = CHECKS[name]
    torch.manual_seed(0)
    model = check.build().eval()
    draw = torch.Generator().manual_seed(0)
    noise = lambda x: torch.randn(x.shape, generator=draw) if x.is_floating_point() else x  # noqa: E731
    inputs = torch.utils._pytree.tree_map(noise, check.inputs)
    states = [_state(model, inputs)]
    hfprune.prune(
        model, PruningConfig(granularity="channel", target=0.5, scope="layer", ignore=list(check.keep)),
        example_inputs=inputs,
    )  # fmt: skip
    states.append(_state(model, inputs))
    row = Row()
    params, macs, plain = ([state[index] for state in states] for index in range(3))
    row.cells["parameters"] = f"{params[0] / 1e6:.3f} -> {params[1] / 1e6:.3f} M"
    row.cells["known parameters"] = f"{check.params[0]} -> {check.params[1]} M"
    row.cells["MACs"] = f"{macs[0] / 1e9:.3f} -> {macs[1] / 1e9:.3f} G"
    row.cells["MACs, layers alone"] = f"{plain[0] / 1e9:.3f} -> {plain[1] / 1e9:.3f} G"
    row.cells["known MACs"] = f"{check.macs[0]} -> {check.macs[1]} G" if check.macs else ""
    _check_close(row, "million parameters", [p / 1e6 for p in params], check.params)
    if check.macs:
        _check_close(row, "GMACs by layers", [m / 1e9 for m in plain], check.macs)
    return row


def _state(model: nn.Module, inputs: Any) -> tuple[int, int, int]:
    return sum(p.numel() for p in model.parameters()), _macs(model, inputs), plain_macs(model, inputs)


def _check_close(row: Row, what: str, found: list[float], known: tuple[float, ...]) -> None:
    """Equal in all digits that are known."""
    for now, wanted in zip(found, known, strict=True):
        digits = len(str(wanted).partition(".")[2])
        if abs(now - wanted) > 10**-digits:
            row.fail(f"{now:.{digits}f} {what} instead of {wanted}")


def plain_macs(model: nn.Module, inputs: Any) -> int:
    """Operations as Torch-Pruning counts them: one per multiplication of linear layers and convolutions, per bias added
    and per element of an activation or a pooling that is a layer of torch, two per element of a norm; none for what
    functions do, so that attention's products are left out."""
    total = 0

    def count(layer: nn.Module, args: tuple, result: torch.Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Linear):
            # Torch-Pruning adds a bias once a layer here, whatever the number of positions.
            total += result.numel() * layer.in_features + (layer.out_features if layer.bias is not None else 0)
        elif isinstance(layer, nn.modules.conv._ConvNd):
            total += result.numel() * (layer.weight[0].numel() + (layer.bias is not None))
        elif isinstance(layer, nn.LayerNorm | nn.modules.batchnorm._BatchNorm | nn.GroupNorm):
            total += 2 * args[0].numel()
        elif isinstance(layer, nn.ReLU | nn.GELU):
            total += result.numel()
        elif isinstance(layer, nn.MaxPool2d | nn.AdaptiveAvgPool2d):
            total += args[0].numel()

    hooks = [layer.register_forward_hook(count) for layer in model.modules()]
    outputs_of(model, inputs)
    for hook in hooks:
        hook.remove()
    return total
