"""The attributes of torch's own layers that follow from the shapes of their tensors."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from hfprune.errors import CheckpointError


def mend(module: nn.Module, told: set[str] | None = None) -> None:
    """Brings the sizes that a layer keeps beside its tensors into line with them.

    Args:
        module: a layer of torch or one derived from it, or any other, which is left as it is.
        told: names of attributes that are known already, and already set.

    Raises:
        CheckpointError: the shapes do not go together with the number of groups.
    """
    for kinds, repair in _REPAIRS:
        if isinstance(module, kinds):
            repair(module, told or set())
    # transformers' own linear layer, which stands inputs x outputs; its name says so in any version.
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        module.nx, module.nf = module.weight.shape


def _linear(module: nn.Linear, told: set[str]) -> None:
    module.out_features, module.in_features = module.weight.shape


def _bilinear(module: nn.Bilinear, told: set[str]) -> None:
    module.out_features, module.in1_features, module.in2_features = module.weight.shape


def _convolution(module: _ConvNd, told: set[str]) -> None:
    first, second = module.weight.shape[:2]
    transposed = isinstance(module, _ConvTransposeNd)
    # A depthwise convolution has a group for each channel that comes in, however many there are.
    if (
        "groups" not in told
        and module.groups > 1
        and module.groups == module.in_channels
        and (transposed or second == 1)
    ):
        per_group = module.out_channels // module.groups
        module.groups = first if transposed else first // per_group
    module.out_channels, module.in_channels = first, second * module.groups
    if transposed:
        module.in_channels, module.out_channels = first, second * module.groups
    if module.groups < 1 or first % module.groups:
        raise CheckpointError(f"{first} channels can't be divided into {module.groups} groups")


def _batch_norm(module: _NormBase, told: set[str]) -> None:
    tensor = module.weight if module.weight is not None else module.running_mean
    if tensor is not None:
        module.num_features = tensor.shape[0]


def _group_norm(module: nn.GroupNorm, told: set[str]) -> None:
    if module.weight is not None:
        module.num_channels = module.weight.shape[0]
    if module.num_groups < 1 or module.num_channels % module.num_groups:
        raise CheckpointError(f"{module.num_channels} channels can't be divided into {module.num_groups} groups")


def _layer_norm(module: nn.LayerNorm | nn.RMSNorm, told: set[str]) -> None:
    if module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)


def _embedding(module: nn.Embedding | nn.EmbeddingBag, told: set[str]) -> None:
    module.num_embeddings, module.embedding_dim = module.weight.shape
    if module.padding_idx is not None and not 0 <= module.padding_idx < module.num_embeddings:
        raise CheckpointError(f"padding_idx {module.padding_idx} is not in an embedding of {module.num_embeddings}")


def _recurrent(module: nn.RNNBase, told: set[str]) -> None:
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    module.input_size = module.weight_ih_l0.shape[1]
    module.hidden_size = module.weight_ih_l0.shape[0] // gates


def _attention(module: nn.MultiheadAttention, told: set[str]) -> None:
    dense = module.embed_dim
    module.embed_dim = module.out_proj.weight.shape[0]
    query, key, value = (
        (module.in_proj_weight.shape[1],) * 3
        if module.in_proj_weight is not None
        else (module.q_proj_weight.shape[1], module.k_proj_weight.shape[1], module.v_proj_weight.shape[1])
    )
    module.kdim, module.vdim = key, value
    if query != module.embed_dim or module.embed_dim % module.num_heads:
        raise CheckpointError(
            f"attention over {dense} channels can't be cut to {module.embed_dim} with {module.num_heads} heads"
        )
    module.head_dim = module.embed_dim // module.num_heads


def _prelu(module: nn.PReLU, told: set[str]) -> None:
    module.num_parameters = module.weight.shape[0]


_REPAIRS: list[tuple[type | tuple[type, ...], Callable[..., None]]] = [
    (nn.Linear, _linear),
    (nn.Bilinear, _bilinear),
    (_ConvNd, _convolution),
    (_NormBase, _batch_norm),
    (nn.GroupNorm, _group_norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    (nn.RNNBase, _recurrent),
    (nn.MultiheadAttention, _attention),
    (nn.PReLU, _prelu),
]
