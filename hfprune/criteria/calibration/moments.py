"""Second moments of what reaches the weights: how the inputs of a layer go together."""

from __future__ import annotations

from typing import Any

import torch

from hfprune.criteria.calibration.running import Calibration, accumulate, evaluated, zeros
from hfprune.criteria.layers import layers_of, seen_by
from hfprune.criteria.tokens import Tokens


def input_moment(calibration: Calibration) -> dict[str, torch.Tensor]:
    """Σ x xᵀ over all tokens, of convolutions over all patches, shape (inputs, inputs), as `criteria.layers.Layer`
    orders them; layers that took no part are left out.

    The sums of all layers are held at once, inputs² values each. A position that `attention_mask` calls padding counts
    nowhere.
    """
    model = calibration.model
    layers = layers_of(model, calibration.weights, "whitening")
    sums: dict[str, torch.Tensor] = {}
    for name, (layer, *_) in layers.items():
        columns = layer.to_matrices(layer.weight.parameter.detach()).shape[-1]
        sums[name] = zeros((columns, columns), layer.weight.parameter)

    now: dict[str, Any] = {}

    def add(batch: Any, number: int) -> int:
        now.update(tokens=Tokens(model, batch), encoded=None)
        calibration.forward(batch)
        return 1

    handles = []
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        encoder = model.get_encoder()
        handles.append(encoder.register_forward_hook(lambda module, args, output: now.update(encoded=output[0])))
    for name, users in layers.items():
        for layer in users:

            def look(module: Any, args: tuple, kwargs: dict, name: str = name, layer: Any = layer) -> None:
                seen = seen_by(args, kwargs)
                real = now["tokens"].real(layer, seen, shared=seen is now["encoded"])
                rows = layer.rows(real)[0].to(sums[name].dtype)
                sums[name].addmm_(rows.t(), rows)

            handles.append(layer.module.register_forward_pre_hook(look, with_kwargs=True))
    try:
        with evaluated(model), torch.no_grad():
            accumulate(calibration, "inputs", add, sums.values())
    finally:
        for handle in handles:
            handle.remove()
    return {name: total for name, total in sums.items() if bool(total.any())}
