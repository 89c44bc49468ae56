"""prune_checkpoint with masks: bit for bit what hfprune.prune makes of the model in memory, and what it refuses."""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import hfprune
from hfprune import PruningConfig, prune_checkpoint
from hfprune.checkpoint.tensors import read_all, tensor_files
from hfprune.errors import CheckpointError, ConfigError, DataError, HfpruneError, ModelError
from tests.support.models import TOKENS, bert, gpt2, llama, pixels, tokens, vit

SHARD = "8KB"


def silent(line):
    pass


def saved(model, folder):
    model.save_pretrained(folder, max_shard_size=SHARD)
    return folder


def tensors(folder):
    return {name: value for path in set(tensor_files(folder).values()) for name, value in read_all(path).items()}


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def equal(one, other):
    left, right = tensors(one), tensors(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def block(folder):
    return json.loads((folder / "config.json").read_text())["hfprune"]


def both(model, tmp_path, config, data=None):
    """The same pruning in memory and from files; the folders of both, and both reports."""
    source = saved(model, tmp_path / "dense")
    pruned = copy.deepcopy(model)
    report = hfprune.prune(pruned, config, data)
    hfprune.save_pretrained(pruned, tmp_path / "memory", max_shard_size=SHARD)
    streamed = prune_checkpoint(source, tmp_path / "stream", config, data, say=silent)
    return tmp_path / "memory", tmp_path / "stream", report, streamed


def bfloat16():
    """Many scores tie."""
    return llama(layers=3).bfloat16()


@pytest.mark.parametrize("build", [llama, bfloat16, vit, gpt2])
@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "l1", "target": 0.53},
        {"criterion": "l2", "target": 0.7, "scope": "layer", "include": ["*.0.*"]},
        {"criterion": "random", "target": 0.45, "min_kept": 0.5},
        {"criterion": "lamp", "target": 0.6, "per_layer": {"*.1.*": 0.2}},
        {"criterion": "l1", "granularity": "2:4"},
        {"criterion": "l2", "granularity": "block:3x5", "target": 0.5, "min_kept": 1},
    ],
)
def test_what_needs_only_weights(build, options, tmp_path):
    memory, stream, report, streamed = both(build(), tmp_path, PruningConfig(**options))
    assert equal(memory, stream)
    assert block(memory) == block(stream)
    assert (streamed.pruned, streamed.units, streamed.achieved) == (report.pruned, report.units, report.achieved)
    assert {path.name for path in memory.iterdir()} == {path.name for path in stream.iterdir()}
    assert hfprune.verify(stream).ok


def t5():
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=TOKENS, decoder_start_token_id=0, **sizes)
    ).eval()


def mixtral():
    """Its experts' tensors are joined while it is loaded."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=TOKENS, **sizes, **heads)).eval()


def padded(seed):
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[1, 7:] = 0
    return tokens(seed=seed) | {"attention_mask": mask}


@pytest.mark.parametrize(
    ("build", "batch"),
    [(llama, padded), (vit, lambda seed: pixels(seed=seed)), (bert, None), (t5, padded), (mixtral, padded)],
)
@pytest.mark.parametrize(
    "options",
    [
        {"criterion": {"name": "wanda", "batches": 2}, "target": 0.5},
        {"criterion": "sparsegpt", "target": 0.6, "scope": "layer"},
        {"criterion": "sparsegpt", "granularity": "2:4"},
    ],
)
def test_what_looks_at_the_inputs_of_layers(build, batch, options, tmp_path):
    def ids(seed):
        return {key: value for key, value in padded(seed).items() if key != "labels"}

    data = [(batch or ids)(seed) for seed in range(3)]
    memory, stream, report, streamed = both(build(), tmp_path, PruningConfig(**options), data)
    assert equal(memory, stream)
    assert block(memory) == block(stream)
    assert (streamed.pruned, streamed.achieved) == (report.pruned, report.achieved)


def test_a_file_without_shards_and_what_goes_along(tmp_path):
    source, output = tmp_path / "dense", tmp_path / "pruned"
    llama().save_pretrained(source)
    for name in ("tokenizer.json", "merges.txt", "pytorch_model.bin", "consolidated.safetensors", "notes.md"):
        (source / name).write_text("{}")
    before = files(source)
    lines = []
    report = prune_checkpoint(source, output, PruningConfig(target=0.5), say=lines.append)
    assert files(source) == before
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "merges.txt"}
    assert {path.name for path in output.iterdir()} == names
    assert len(lines) == 1 and lines[0].startswith("peak memory at most 67.") and "whole model takes" in lines[0]
    model = type(llama()).from_pretrained(output)
    assert sum(int((p == 0).sum()) for p in model.parameters()) >= report.pruned == 1920
    assert "1,920 of 3,840" in report.table().title


def test_stored_sparse(tmp_path):
    source = saved(llama(), tmp_path / "dense")
    lines = []
    for sparse, name in ((None, "plain"), ("bitmask", "sparse")):
        prune_checkpoint(source, tmp_path / name, PruningConfig(target=0.8), sparse=sparse, say=lines.append)
    assert "a file stored sparse" not in lines[0] and "a file stored sparse" in lines[1]
    assert hfprune.verify(tmp_path / "sparse").ok
    plain = hfprune.from_pretrained(tmp_path / "plain").state_dict()
    sparse = hfprune.from_pretrained(tmp_path / "sparse").state_dict()
    assert all(torch.equal(plain[name], sparse[name]) for name in plain)


def test_a_failure_leaves_the_output_as_it_was(tmp_path):
    source = saved(llama(), tmp_path / "dense")
    path = sorted(source.glob("*.safetensors"))[-1]
    damaged = load_file(path)
    name = next(name for name in damaged if "proj" in name)
    damaged[name].view(-1)[3] = float("nan")
    save_file(damaged, path, metadata={"format": "pt"})
    output = tmp_path / "pruned"
    output.mkdir()
    (output / "config.json").write_text("mine")
    with pytest.raises(ModelError, match="not a number"):
        prune_checkpoint(source, output, PruningConfig(target=0.5), say=silent)
    assert files(output) == {"config.json": b"mine"}
    with pytest.raises(ModelError, match="not finite"):
        prune_checkpoint(source, tmp_path / "new", PruningConfig(criterion="wanda", target=0.5), tokens(), say=silent)
    assert not (tmp_path / "new").exists()


def test_an_interruption_leaves_nothing(tmp_path):
    source = saved(llama(), tmp_path / "dense")
    told = []

    def stop_later(words, done, total):
        told.append(words)
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(source, tmp_path / "out", PruningConfig(target=0.5), progress=stop_later, say=silent)
    assert len(told) == 4 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"criterion": "taylor"}, "criterion: 'taylor' needs the whole model in memory; with streaming use l1"),
        ({"criterion": "wanda", "granularity": "block:2x2"}, "'wanda' needs the whole model in memory"),
        ({"criterion": "wanda"}, "'wanda' looks at the inputs of layers and needs data"),
        ({"schedule": {"kind": "geometric", "steps": 3}}, "schedule: steps without fine-tuning"),
        ({"strategy": "ice"}, "strategy: fine-tuning between steps needs the whole model"),
    ],
)
def test_a_configuration_that_needs_the_model_is_refused(options, problem, tmp_path):
    source = saved(llama(), tmp_path / "dense")
    with pytest.raises(ConfigError, match=problem):
        prune_checkpoint(source, tmp_path / "out", PruningConfig(**{"target": 0.5} | options), say=silent)
    assert not (tmp_path / "out").exists()


def refused(source, tmp_path, config=None, data=None, **options):
    with pytest.raises(HfpruneError) as caught:
        prune_checkpoint(
            source, tmp_path / "out", config or PruningConfig(target=0.5), data, **{"say": silent} | options
        )
    assert not (tmp_path / "out").exists() and "\n" not in str(caught.value)
    return str(caught.value)


def test_folders_that_are_refused(tmp_path):
    source = saved(llama(), tmp_path / "dense")
    values = json.loads((source / "config.json").read_text())

    def says(**changes):
        other = tmp_path / "other"
        saved(llama(), other)
        (other / "config.json").write_text(json.dumps(values | changes))
        return refused(other, tmp_path)

    assert "is pruned already" in says(hfprune={"format_version": 1})
    assert "is quantized" in says(quantization_config={"quant_method": "gptq"})
    assert "architecture 'NoSuchModel'" in says(architectures=["NoSuchModel"])
    assert "lacks tensors of LlamaForCausalLM: 'model.layers.2." in says(num_hidden_layers=3)
    assert "has the shape (16, 24), and LlamaForCausalLM takes (16, 32)" in says(intermediate_size=32)
    assert "holds no config.json" in refused(tmp_path / "nothing", tmp_path)
    assert "no way of storing" in refused(source, tmp_path, sparse="coo")
    with pytest.raises(CheckpointError, match="is the folder that is read"):
        prune_checkpoint(source, source, PruningConfig(target=0.5), say=silent)
    next(source.glob("*.safetensors")).write_bytes(b"torn")
    assert "is damaged" in refused(source, tmp_path)


def test_joined_tensors_are_no_weights_to_prune(tmp_path):
    source = saved(mixtral(), tmp_path / "dense")
    config = PruningConfig(target=0.5, include=["*.experts.gate_up_proj"])
    assert "is joined from 8 tensors" in refused(source, tmp_path, config)


def test_models_that_show_no_blocks_are_refused(tmp_path):
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=2
    )
    source = saved(transformers.SwinForImageClassification(config), tmp_path / "dense")
    wanda = PruningConfig(criterion="wanda", target=0.5)
    assert "can't be streamed block by block" in refused(
        source, tmp_path, wanda, {"pixel_values": torch.randn(1, 3, 16, 16)}
    )


def test_a_decoder_whose_inputs_are_not_given(tmp_path):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8, "max_source_positions": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    words = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes, **heads, **words))
    source = saved(model, tmp_path / "dense")
    data = {"input_features": torch.randn(1, 8, 32), "labels": torch.ones(1, 4, dtype=torch.long)}
    with pytest.raises(DataError, match="give decoder_input_ids"):
        prune_checkpoint(source, tmp_path / "out", PruningConfig(criterion="wanda", target=0.5), data, say=silent)
