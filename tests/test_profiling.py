import copy

import pytest
import torch
from torch import nn

from hfprune.errors import ModelError
from hfprune.profiling import example_batch, human_bytes, human_count, measure


def macs(model, inputs=None):
    return measure(model, inputs, latency=False).macs


class Attention(nn.Module):
    def __init__(self, heads, kv_heads, size):
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, size
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        batch, length, _ = x.shape
        q = x.view(batch, length, self.heads, self.size).transpose(1, 2) * self.scale
        k = q[:, : self.kv_heads]
        return nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=self.heads != self.kv_heads)


class Unbatched(nn.Linear):
    def forward(self, x):
        return super().forward(x[0])


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (nn.Linear(8, 4), (1, 8), 8 * 4),
        (nn.Linear(8, 4), (3, 5, 8), 5 * 8 * 4),
        (Unbatched(8, 4), (1, 8), 8 * 4),
        (Unbatched(8, 4, bias=False), (1, 8), 8 * 4),
        (nn.Conv2d(3, 6, 3, padding=1), (1, 3, 10, 10), 3 * 6 * 9 * 100),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), (1, 8, 10, 10), 8 * 9 * 100),
        (nn.Conv2d(8, 4, 3, stride=2, groups=2), (1, 8, 9, 9), 4 * 4 * 9 * 16),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 5), 4 * 6 * 4 * 25),
        (nn.Conv1d(4, 6, 3), (1, 4, 12), 4 * 6 * 3 * 10),
        (nn.LSTM(4, 6, batch_first=True), (1, 7, 4), 7 * 4 * 6 * (4 + 6)),
        (Attention(4, 4, 8), (1, 10, 32), 2 * 4 * 10 * 10 * 8),
        (Attention(4, 2, 8), (1, 10, 32), 2 * 4 * 10 * 10 * 8),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (1, 5, 8), 5 * (4 * 64 + 2 * 128) + 2 * 25 * 8),
    ],
)
def test_macs_equal_hand_arithmetic(model, shape, expected):
    assert macs(model, torch.randn(*shape)) == expected


def test_macs_of_a_resnet18_are_the_published_ones():
    from torchvision.models import resnet18

    assert 1.814e9 <= macs(resnet18(), torch.randn(1, 3, 224, 224)) <= 1.822e9


def test_macs_that_cannot_be_counted_are_none():
    assert macs(nn.ReLU(), torch.randn(1, 4)) is None


def test_parameters_and_bytes_count_tied_tensors_once_and_buffers():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    model[2].register_buffer("scratch", torch.zeros(1000), persistent=False)
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].weight[1:] = 1
    found = measure(model, torch.randn(2, 4), latency=False)
    assert found.params == 16 + 8
    assert found.nonzero == 12 + 4  # the norm's bias starts at zero
    assert found.bytes == 4 * (16 + 8 + 8) + 8
    assert measure(model.half(), torch.randn(2, 4).half(), latency=False).bytes == 2 * (16 + 8 + 8) + 8


class Restless(nn.Module):
    """Draws random numbers and writes to its buffers in every forward pass."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x):
        self.seen += 1
        self.last = torch.rand(1)
        return self.norm(self.layer(x))


def test_the_model_and_the_random_state_are_left_as_they_were():
    torch.manual_seed(3)
    model = Restless()
    model.norm.eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    measure(model, torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), batch_sizes=(1, 3), repeats=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training and model.layer.training and not model.norm.training
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_model_that_raises_is_left_as_it_was_and_told_plainly():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    with pytest.raises(ModelError, match=r"Sequential can't take .* batch size 1 .*\(1, 5\)"):
        measure(model, torch.randn(1, 5))
    assert model.training and model[1].training


def test_latency_is_reported_per_batch_size_and_memory_only_where_measured():
    found = measure(nn.Linear(4, 4), torch.randn(3, 4), batch_sizes=(1, 8), repeats=2)
    assert list(found.latency_ms) == [1, 8] and all(value > 0 for value in found.latency_ms.values())
    assert found.memory_bytes is None
    plain = found.to_dict()
    assert list(plain["latency_ms"]) == ["1", "8"] and plain["memory_bytes"] is None
    assert measure(nn.Linear(4, 4), torch.randn(3, 4), latency=False).latency_ms == {}


def test_the_table_shows_what_was_measured():
    from rich.console import Console

    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(measure(nn.Linear(1000, 100), torch.randn(3, 1000), batch_sizes=(2,), repeats=1).table())
    text = console.export_text()
    assert "100,100" in text and "400 kB" in text and "100 K" in text and "latency, batch 2" in text
    assert "memory" not in text


@pytest.mark.parametrize("size", [1, 2, 5])
def test_inputs_are_cut_or_repeated_to_the_batch_size(size):
    model = nn.Linear(4, 4)
    x = torch.arange(12.0, dtype=torch.float64).view(3, 4)
    (batch,), kwargs = example_batch(model, x, size)
    assert batch.shape == (size, 4) and batch.dtype == torch.float32 and kwargs == {}
    assert torch.equal(batch.double(), x[torch.arange(size) % 3])
    given = {"ids": torch.arange(3), "shared": torch.ones(7, 2), "parts": [x, 5], "none": None}
    args, kwargs = example_batch(model, given, size)
    assert args == () and kwargs["ids"].dtype == torch.int64 and len(kwargs["ids"]) == size
    assert kwargs["shared"].shape == (7, 2) and len(kwargs["parts"][0]) == size
    assert kwargs["parts"][1] == 5 and kwargs["none"] is None


class Product(nn.Module):
    def forward(self, a, b):
        return a @ b


def test_positional_and_keyword_arguments():
    a, b = torch.randn(5, 2, 3), torch.randn(5, 3, 4)
    assert macs(Product(), (a, b)) == macs(Product(), {"b": b, "a": a}) == 2 * 3 * 4


@pytest.mark.parametrize("given", [None, {}, {"x": 3}, torch.zeros(0, 4), "text"])
def test_inputs_that_cannot_be_used_are_refused(given):
    with pytest.raises(ModelError, match="example_inputs"):
        measure(nn.Linear(4, 4), given)


def test_batch_sizes_and_repeats_below_one_are_refused():
    with pytest.raises(ModelError, match="at least 1"):
        measure(nn.Linear(4, 4), torch.randn(1, 4), batch_sizes=(0,))


def test_a_model_without_values_is_refused():
    with pytest.raises(ModelError, match="meta"):
        measure(nn.Linear(4, 4, device="meta"), torch.randn(1, 4))


def transformers_model(kind):
    import transformers as t

    torch.manual_seed(0)
    text = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2}
    vision = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    if kind == "vit":
        return t.ViTForImageClassification(t.ViTConfig(**vision, **heads, num_channels=1, num_labels=3))
    if kind == "bert":
        return t.BertForSequenceClassification(t.BertConfig(**text, **heads, max_position_embeddings=20))
    if kind == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**text, num_attention_heads=4, num_key_value_heads=2))
    if kind == "mixtral":
        moe = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
        return t.MixtralForCausalLM(t.MixtralConfig(**text, **moe))
    if kind == "t5":
        return t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
        )
    if kind == "wav2vec2":
        conv = {
            "conv_dim": (8, 8),
            "conv_stride": (10, 10),
            "conv_kernel": (10, 10),
            "num_conv_pos_embedding_groups": 2,
        }
        return t.Wav2Vec2ForCTC(t.Wav2Vec2Config(**text, **heads, **conv, num_feat_extract_layers=2))
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_mel_bins": 8, "max_source_positions": 20}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return t.WhisperForConditionalGeneration(
        t.WhisperConfig(vocab_size=50, max_target_positions=12, **layers, **sizes, **special)
    )


@pytest.mark.parametrize("kind", ["vit", "bert", "llama", "mixtral", "t5", "wav2vec2", "whisper"])
def test_inputs_are_made_for_transformers_models(kind):
    model = transformers_model(kind)
    found = measure(model, batch_sizes=(2,), repeats=1)
    assert found.macs > 0 and found.latency_ms[2] > 0


def test_macs_of_transformers_models_equal_hand_arithmetic():
    length, hidden, inner, vocabulary = 128, 16, 24, 50
    attention = length * (2 * hidden * hidden + 2 * hidden * 8) + 2 * length * length * hidden
    dense = length * (3 * hidden * inner + hidden * vocabulary)
    assert macs(transformers_model("llama")) == attention + dense
    routed = length * (2 * 3 * hidden * inner + hidden * 4 + hidden * vocabulary)
    assert macs(transformers_model("mixtral")) == attention + routed


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_tiny_patch16_224", {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 12, "depth": 1}),
        ("resnet10t", {"in_chans": 1, "num_classes": 2}),
    ],
)
def test_inputs_are_made_for_timm_models(name, args):
    import timm

    model = timm.create_model(name, pretrained=False, **args)
    assert measure(model, latency=False).macs > 0


@pytest.mark.parametrize(
    ("value", "size", "count"), [(7, "7 B", "7"), (999_600, "1.00 MB", "1.00 M"), (123_456, "123 kB", "123 K")]
)
def test_numbers_are_readable(value, size, count):
    assert human_bytes(value) == size and human_count(value) == count


class Token(nn.Module):
    """A view of a parameter is given to a module as its input."""

    def __init__(self):
        super().__init__()
        self.token, self.inner = nn.Parameter(torch.randn(1, 4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.inner(x) + self.inner(self.token.expand(len(x), -1))


def test_a_view_of_a_parameter_may_be_an_input():
    model = Token()
    model.inner.bias.requires_grad_(False)
    assert measure(model, torch.randn(1, 4), latency=False).macs == 24
    assert [p.requires_grad for p in model.parameters()] == [True, True, False]
