"""measure(): parameters, non-zeros, bytes, multiply-accumulates, latency and memory of a model, on this machine."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hfprune.errors import ModelError

if TYPE_CHECKING:
    from rich.table import Table

TEXT_LENGTH = 128
SECONDS_FOR_LATENCY = 20.0
SHORTEST_SAMPLE = 0.005
FORWARD_FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)


@dataclass(frozen=True)
class Measurement:
    """What `measure` found.

    Attributes:
        params: number of parameters, tied ones once.
        nonzero: how many of them are not exactly zero.
        bytes: weight of the checkpoint's tensors (parameters and saved buffers, tied ones once).
        macs: multiply-accumulates of one forward pass of one example; None where they could not be counted.
        latency_ms: batch size to median milliseconds of one forward pass of the whole batch; empty if not asked for.
        memory_bytes: batch size to peak bytes allocated in a forward pass, weights included; None off CUDA.
    """

    params: int
    nonzero: int
    bytes: int
    macs: int | None
    latency_ms: dict[int, float]
    memory_bytes: dict[int, int] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; batch sizes as strings."""
        values = asdict(self)
        values["latency_ms"] = {str(batch): value for batch, value in self.latency_ms.items()}
        if self.memory_bytes is not None:
            values["memory_bytes"] = {str(batch): value for batch, value in self.memory_bytes.items()}
        return values

    def table(self) -> Table:
        """The numbers for `rich.print`; what was not measured has no row."""
        from rich.table import Table

        table = Table("measure", show_edge=False)
        table.add_column("value", justify="right")
        table.add_row("parameters", f"{self.params:,}")
        table.add_row("non-zero parameters", f"{self.nonzero:,}")
        table.add_row("checkpoint tensors", human_bytes(self.bytes))
        if self.macs is not None:
            table.add_row("MACs, one example", human_count(self.macs))
        for batch, value in self.latency_ms.items():
            table.add_row(f"latency, batch {batch}", human_ms(value))
        for batch, value in (self.memory_bytes or {}).items():
            table.add_row(f"peak memory, batch {batch}", human_bytes(value))
        return table


def measure(
    model: nn.Module,
    example_inputs: torch.Tensor | tuple | Mapping[str, Any] | None = None,
    batch_sizes: tuple[int, ...] | list[int] = (1, 32),
    *,
    repeats: int = 15,
    latency: bool = True,
) -> Measurement:
    """Measures a model on the device where it lies, in evaluation mode and without gradients.

    The model comes back bit-identical, in the mode it was in, without hooks; the random state is restored as well.
    MACs are those of dense arithmetic: zeros are multiplied like any other number. Latency is the median over `repeats`
    rounds, each of which visits every batch size, so that a machine that slows down touches all alike; once a slow
    model has used 20 s, three rounds are enough.

    Args:
        model: any module; all of it on one device.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, of any batch size: it is
            repeated or cut along dimension 0. May be left out for transformers and timm models.
        batch_sizes: batch sizes for latency and memory.
        repeats: rounds that the median is taken over.
        latency: whether to measure latency and memory at all.

    Raises:
        ModelError: when inputs can't be made for the model, or the model can't take them.

    Example:
        >>> measure(nn.Linear(8, 4), torch.randn(1, 8), latency=False).macs
        32
    """
    if repeats < 1 or any(batch < 1 for batch in batch_sizes):
        raise ModelError(f"repeats and batch sizes must be at least 1, not {repeats} and {list(batch_sizes)}")
    parameters = list(model.parameters())
    device = parameters[0].device if parameters else torch.device("cpu")
    if device.type == "meta":
        raise ModelError("the model lies on the meta device and has no values to measure; load it onto a real one")
    latencies: dict[int, float] = {}
    memory: dict[int, int] | None = None
    with _untouched(model, device):
        single = example_batch(model, example_inputs, 1)
        _forward(model, single, 1)
        macs = _count_macs(model, single)
        if latency:
            batches = {batch: example_batch(model, example_inputs, batch) for batch in batch_sizes}
            latencies = _latency(model, batches, device, repeats)
            if device.type == "cuda":
                memory = {batch: _peak_memory(model, inputs, batch, device) for batch, inputs in batches.items()}
    return Measurement(
        params=sum(p.numel() for p in parameters),
        nonzero=sum(int(torch.count_nonzero(p.detach())) for p in parameters),
        bytes=checkpoint_bytes(model),
        macs=macs,
        latency_ms=latencies,
        memory_bytes=memory,
    )


def checkpoint_bytes(model: nn.Module) -> int:
    """Bytes of the tensors in the model's state dict, those that share their memory counted once."""
    sizes = {}
    for tensor in model.state_dict(keep_vars=True).values():
        if isinstance(tensor, torch.Tensor):
            place = tensor.untyped_storage().data_ptr()
            same = (tensor.device, place, tensor.storage_offset(), tuple(tensor.shape)) if place else id(tensor)
            sizes[same] = tensor.numel() * tensor.element_size()
    return sum(sizes.values())


def example_batch(model: nn.Module, example_inputs: Any = None, batch_size: int = 1) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments for one forward pass of `batch_size` examples, on the model's device.

    Tensors whose first dimension is the batch's are repeated or cut; all others stay. Floating-point tensors take the
    dtype of the model's parameters.

    Raises:
        ModelError: when nothing was given and nothing can be made from the model's config.
    """
    if example_inputs is None:
        example_inputs = _made_inputs(model)
    if isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    elif isinstance(example_inputs, torch.Tensor):
        args, kwargs = (example_inputs,), {}
    elif isinstance(example_inputs, tuple | list):
        args, kwargs = tuple(example_inputs), {}
    else:
        raise ModelError(f"example_inputs: a tensor, tuple or dict is needed, not {type(example_inputs).__name__}")
    first = next((t for t in _tensors((args, kwargs)) if t.ndim), None)
    if first is None or not len(first):
        raise ModelError("example_inputs: no tensor with at least one example was found in it")
    like = next((p for p in model.parameters() if p.is_floating_point()), first)

    def fit(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim and len(tensor) == len(first):
            tensor = tensor[torch.arange(batch_size, device=tensor.device) % len(first)]
        return tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)

    return _map_tensors(fit, args), _map_tensors(fit, kwargs)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, Mapping | list | tuple):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from _tensors(value)


def _map_tensors(change: Callable[[torch.Tensor], torch.Tensor], values: Any) -> Any:
    if isinstance(values, torch.Tensor):
        return change(values)
    if isinstance(values, Mapping):
        return {key: _map_tensors(change, value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)([_map_tensors(change, value) for value in values])
    return values


def _made_inputs(model: nn.Module) -> dict[str, torch.Tensor] | tuple:
    """One example from what the model's own config says; the same values every time."""
    config = getattr(model, "config", None)
    if hasattr(config, "to_dict") and hasattr(model, "main_input_name"):
        return _transformers_inputs(model, config)
    if hasattr(model, "pretrained_cfg"):
        return (_image(*_timm_size(model)),)
    raise ModelError(
        f"example_inputs: missing, and none can be made for {type(model).__name__}; give a tensor, tuple or dict"
    )


def _image(channels: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))


def _timm_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width: as the model was built, which `pretrained_cfg` does not follow."""
    channels, height, width = model.pretrained_cfg["input_size"]
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and first.groups == 1 and first.in_channels in (1, 2, 3, 4):
        channels = first.in_channels
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if built is not None:
        height, width = (built, built) if isinstance(built, int) else built
    return channels, height, width


def _transformers_inputs(model: nn.Module, config: Any) -> dict[str, torch.Tensor]:
    name = model.main_input_name
    text = config.get_text_config(decoder=True) if config.is_encoder_decoder else config.get_text_config()
    longest = next(
        (n for key in ("max_position_embeddings", "max_target_positions") if (n := getattr(text, key, None))),
        TEXT_LENGTH,
    )
    length = min(TEXT_LENGTH, longest)
    inputs: dict[str, torch.Tensor] = {}
    try:
        if name == "pixel_values":
            inputs[name] = _image(*_transformers_image_size(model, config))
        elif name == "input_ids":
            inputs[name] = _token_ids(text, length)
        elif name == "input_values":
            inputs[name] = torch.randn(1, 16_000, generator=torch.Generator().manual_seed(0))
        elif name == "input_features":
            frames = 2 * config.max_source_positions
            inputs[name] = torch.randn(1, config.num_mel_bins, frames, generator=torch.Generator().manual_seed(0))
        if config.is_encoder_decoder and inputs:
            inputs["decoder_input_ids"] = _token_ids(text, length)
    except AttributeError as error:
        raise ModelError(f"example_inputs: missing, and none can be made from the config: {error}") from error
    if not inputs:
        raise ModelError(f"example_inputs: missing, and none can be made for the input '{name}'; give a dict")
    return inputs


def _token_ids(config: Any, length: int) -> torch.Tensor:
    """Shape (1, length). The upper half of the vocabulary: special tokens, padding above all, usually lie below."""
    low = config.vocab_size // 2
    return torch.randint(low, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def _transformers_image_size(model: nn.Module, config: Any) -> tuple[int, int, int]:
    wrapped = getattr(model, "timm_model", None)
    if wrapped is not None:
        return _timm_size(wrapped)
    config = getattr(config, "vision_config", None) or config
    size = getattr(config, "image_size", None) or 224
    if isinstance(size, Mapping):
        size = (size["height"], size["width"])
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(config, "num_channels", 3), height, width


@contextlib.contextmanager
def _untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients; modes, buffers and the random state are as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    buffers = [(m, n, b, b.detach().clone()) for m in model.modules() for n, b in m._buffers.items() if b is not None]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            model.eval().requires_grad_(False)  # FlopCounterMode refuses views of parameters that need gradients
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def _forward(model: nn.Module, inputs: tuple[tuple, dict[str, Any]], batch: int) -> None:
    try:
        model(*inputs[0], **inputs[1])
    except FORWARD_FAILURES as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in _tensors(inputs))
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(
            f"{type(model).__name__} can't take the example inputs at batch size {batch} (shapes {shapes}): {reason}"
        ) from error


def _count_macs(model: nn.Module, inputs: tuple[tuple, dict[str, Any]]) -> int | None:
    """None where nothing countable ran. Fused kernels hide their arithmetic from the counter, so that attention,
    transformer layers and recurrent layers take their plain paths here."""
    counter = FlopCounterMode(display=False, custom_mapping=_more_flops())
    fused = torch.backends.mha.get_fastpath_enabled()
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with contextlib.ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if recurrent:
                stack.enter_context(warnings.catch_warnings(action="ignore"))  # the switch below warns of TF32
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            stack.enter_context(counter)
            model(*inputs[0], **inputs[1])
    except FORWARD_FAILURES:
        return None
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops() // 2 or None


def _more_flops() -> dict[Any, Callable[..., int]]:
    """Matrix products that torch's own counter leaves out: matrix times vector, and the experts' grouped product."""

    def grouped_mm(a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * math.prod(a) * b[-1]

    def mv(*shapes: torch.Size, **_: Any) -> int:
        return 2 * math.prod(shapes[-2])  # (matrix, vector), or (bias, matrix, vector)

    known = {"mv": mv, "addmv": mv, "_grouped_mm": grouped_mm}
    return {getattr(torch.ops.aten, name): count for name, count in known.items() if hasattr(torch.ops.aten, name)}


def _latency(
    model: nn.Module, batches: dict[int, tuple[tuple, dict]], device: torch.device, repeats: int
) -> dict[int, float]:
    """Batch size to median milliseconds; a sample of a quick model averages over several passes."""

    def seconds(batch: int, passes: int) -> float:
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(passes):
            _forward(model, batches[batch], batch)
        _synchronize(device)
        return (time.perf_counter() - start) / passes

    began = time.perf_counter()
    passes = {}
    for batch in batches:
        seconds(batch, 1)
        passes[batch] = min(50, max(1, math.ceil(SHORTEST_SAMPLE / seconds(batch, 1))))
    samples: dict[int, list[float]] = {batch: [] for batch in batches}
    for done in range(repeats):
        if done >= 3 and time.perf_counter() - began > SECONDS_FOR_LATENCY:
            break
        for batch, taken in samples.items():
            taken.append(seconds(batch, passes[batch]))
    return {batch: statistics.median(taken) * 1000 for batch, taken in samples.items()}


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _peak_memory(model: nn.Module, inputs: tuple[tuple, dict[str, Any]], batch: int, device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    _forward(model, inputs, batch)
    return torch.cuda.max_memory_allocated(device)


def human_bytes(count: float) -> str:
    """1804840 as '1.80 MB'; powers of 1000, three digits."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def human_count(count: float) -> str:
    """7300000 as '7.30 M'; powers of 1000, three digits."""
    return _scaled(count, ("", "K", "M", "G", "T"))


def human_ms(milliseconds: float) -> str:
    """Milliseconds with three digits."""
    return f"{_three_digits(milliseconds)} ms"


def _scaled(count: float, units: tuple[str, ...]) -> str:
    index = 0
    while abs(count) >= 999.5 and index < len(units) - 1:
        count, index = count / 1000, index + 1
    text = f"{count:.0f}" if index == 0 else _three_digits(count)
    return f"{text} {units[index]}".strip()


def _three_digits(value: float) -> str:
    return f"{value:.{0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2}f}"
