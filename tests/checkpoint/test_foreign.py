"""What other tools pruned: sparse checkpoints of compressed-tensors, and masks of torch.nn.utils.prune."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune
from transformers.utils import is_compressed_tensors_available
from typer.testing import CliRunner

import hfprune
from hfprune import PruningConfig, PruningTrainer
from hfprune.checkpoint.convert import convert
from hfprune.cli import app
from hfprune.errors import CheckpointError, ModelError
from tests.support.models import MLP, TINY, Tied, llama, logits, snapshot

FORMATS = {"sparse-bitmask": {"target": 0.6}, "sparse-24-bitmask": {"granularity": "2:4"}}


def legacy_parts(name, weight, style):
    """The layout of compressed-tensors."""
    kept = weight != 0
    values = weight.view(torch.uint8)[kept].view(weight.dtype) if weight.element_size() == 1 else weight[kept]
    rows = torch.from_numpy(np.packbits(kept.numpy(), axis=-1, bitorder="little"))
    shape = torch.tensor(weight.shape)
    if style == "sparse-24-bitmask":
        return {
            f"{name}.shape": shape.view(-1, 1),
            f"{name}.compressed": values.view(len(weight), -1),
            f"{name}.bitmask": rows,
        }
    counts = kept.sum(-1)
    parts = {f"{name}.shape": shape, f"{name}.compressed": values, f"{name}.bitmask": rows}
    return parts | {f"{name}.row_offsets": counts.cumsum(0) - counts}


def legacy(folder, style="sparse-bitmask", dtype=torch.float32, shards=1, **method):
    """A folder as compressed-tensors left it, and the model that it holds."""
    model = llama(hidden_act="gelu").to(dtype)
    hfprune.prune(model, PruningConfig(**FORMATS[style]))
    tensors = {}
    for name, value in model.state_dict().items():
        inner = name.removesuffix(".weight")
        tensors |= legacy_parts(inner, value, style) if inner.endswith("_proj") else {name: value.contiguous()}
    config = {k: v for k, v in model.config.to_dict().items() if k != "hfprune"}
    sparsity = {"format": style, "global_sparsity": 0.5, "sparsity_structure": "unstructured"}
    config["quantization_config"] = {"quant_method": "compressed-tensors", "sparsity_config": sparsity} | method
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": str(dtype).removeprefix("torch.")}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    files = ["model.safetensors"] if shards == 1 else [f"model-{i}-of-{shards}.safetensors" for i in range(shards)]
    places = {name: files[i % shards] for i, name in enumerate(tensors)}  # the parts of a tensor in several files
    for file in files:
        save_file({n: t for n, t in tensors.items() if places[n] == file}, folder / file, metadata={"format": "pt"})
    if shards > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


def same_tensors(model, other):
    state, wanted = model.state_dict(), other.state_dict()
    return state.keys() == wanted.keys() and all(
        value.dtype == wanted[name].dtype and torch.equal(value, wanted[name]) for name, value in state.items()
    )


@pytest.mark.parametrize("style", FORMATS)
@pytest.mark.parametrize(("dtype", "shards"), [(torch.float32, 1), (torch.bfloat16, 3)])
def test_compressed_tensors_is_loaded(tmp_path, style, dtype, shards):
    model = legacy(tmp_path / "legacy", style, dtype, shards)
    again = hfprune.from_pretrained(tmp_path / "legacy")
    assert same_tensors(again, model)
    assert getattr(again.config, "quantization_config", None) is None
    assert again.config.hfprune["pruning"] == {"imported_from": "compressed-tensors"}
    hfprune.save_pretrained(again, tmp_path / "saved", sparse="bitmask")
    encodings = json.loads((tmp_path / "saved" / "config.json").read_text())["hfprune"]["encodings"]
    assert set(encodings.values()) == {"2:4" if style == "sparse-24-bitmask" else "bitmask"}
    assert same_tensors(hfprune.from_pretrained(tmp_path / "saved"), model)


@pytest.mark.skipif(is_compressed_tensors_available(), reason="where the package is installed, it has the say")
def test_compressed_tensors_by_plain_from_pretrained(tmp_path):
    model = legacy(tmp_path / "legacy", shards=2)
    assert same_tensors(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "legacy"), model)
    legacy(tmp_path / "quantized", config_groups={"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}})
    with pytest.raises(CheckpointError, match="is quantized and sparse"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")


@pytest.mark.parametrize("style", FORMATS)
def test_compressed_tensors_is_converted(tmp_path, style):
    model = legacy(tmp_path / "legacy", style, torch.bfloat16, shards=2)
    for kind in ("dense", "bitmask"):
        done = CliRunner().invoke(app, ["convert", str(tmp_path / "legacy"), str(tmp_path / kind), "--to", kind])
        assert done.exit_code == 0, done.output
        assert hfprune.verify(tmp_path / kind).ok
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        assert same_tensors(again, model)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    assert {record["pattern"] for record in config["hfprune"]["sparsity"].values()} == {
        "2:4" if style == "sparse-24-bitmask" else "unstructured"
    }


def without(end):
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(end)]


def fewer_values(tensors):
    name = next(name for name in tensors if name.endswith(".compressed"))
    tensors[name] = tensors[name][:-1].clone()


def narrower(tensors):
    name = next(name for name in tensors if name.endswith(".bitmask"))
    tensors[name] = tensors[name][:, :1].contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(".shape"), "lacks 'model.layers.0.mlp.down_proj.shape', a part of the sparse tensor"),
        (without(".compressed"), "lacks 'model.layers.0.mlp.down_proj.compressed'"),
        (fewer_values, "can't be expanded: the mask has .* places, but there are"),
        (narrower, "a mask of the shape .* does not fit the shape"),
    ],
)
def test_damage_of_compressed_tensors_is_named(tmp_path, change, message):
    legacy(tmp_path / "legacy")
    tensors = load_file(tmp_path / "legacy" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "legacy" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        hfprune.from_pretrained(tmp_path / "legacy")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "legacy", tmp_path / "new", sparse=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"config_groups": {"group_0": {"targets": ["Linear"]}}}, "is quantized and sparse"),
        ({"format": "pack-quantized"}, "is quantized and sparse"),
        ({"sparsity_config": {"format": "marlin-24"}}, "'marlin-24'; hfprune reads sparse-bitmask and sparse-24"),
    ],
)
def test_what_is_quantized_is_refused(tmp_path, method, message):
    legacy(tmp_path / "legacy", **method)
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "legacy"), str(tmp_path / "new"), "--to", "dense"])
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    with pytest.raises(CheckpointError, match=message):
        hfprune.from_pretrained(tmp_path / "legacy")


def under_torch_prune(name, amount=0.6):
    model = TINY[name].build().eval()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    for layer in layers[:-1]:
        prune.l1_unstructured(layer, "weight", amount)
    prune.random_unstructured(layers[0], "weight", 0.3)  # a second time: torch joins the masks
    return model


@pytest.mark.parametrize("name", ["mlp", "vit", "bert", "llama", "timm_vit"])
def test_masks_of_torch_are_imported(tmp_path, name):
    tiny, model = TINY[name], under_torch_prune(name)
    before = logits(model, tiny.batch())
    zeros = {k.removesuffix("_mask"): int((v == 0).sum()) for k, v in model.named_buffers() if k.endswith("_mask")}
    masks = hfprune.import_torch_prune(model)
    assert {key: layer.zeros for key, layer in masks.sparsity().items()} == zeros
    assert torch.equal(logits(model, tiny.batch()), before)
    assert not [key for key in model.state_dict() if key.endswith(("_orig", "_mask"))]
    assert not any(
        bool(torch.signbit(p[~masks.kept[key]]).any()) for key, p in model.named_parameters() if key in masks
    )
    hfprune.save_pretrained(model, tmp_path, sparse="bitmask")
    assert hfprune.verify(tmp_path).zeros == masks.zeros
    again = hfprune.from_pretrained(tmp_path, tiny.build if tiny.kind == "own" else None)
    assert torch.equal(logits(again, tiny.batch()), before)
    # Pruned further, what torch pruned stays pruned.
    report = hfprune.prune(again, PruningConfig(target=0.8), tiny.batch())
    assert all(not report.masks.kept[key][~mask].any() for key, mask in masks.kept.items() if key in report.masks)


def test_a_mask_of_numbers_is_multiplied():
    model = MLP()
    mask = torch.tensor([0.0, 0.5, 1.0, 2.0]).repeat(24).view(12, 8)
    weight = model.first.weight.detach().clone()
    prune.custom_from_mask(model.first, "weight", mask)
    hfprune.import_torch_prune(model)
    assert torch.equal(model.first.weight, weight * mask)


def test_models_under_torch_prune_are_refused_where_masks_would_be_lost(tmp_path):
    model = under_torch_prune("mlp")
    before = snapshot(model)
    for act in (
        lambda: hfprune.save_pretrained(model, tmp_path / "new"),
        lambda: hfprune.prune(model, PruningConfig(target=0.5)),
        lambda: PruningTrainer(model, transformers.TrainingArguments(str(tmp_path / "run"), use_cpu=True)),
    ):
        with pytest.raises(
            ModelError, match=r"under torch.nn.utils.prune \('first.weight'\); hfprune.import_torch_prune"
        ):
            act()
    after = snapshot(model)
    assert all(torch.equal(value, after[key]) for key, value in before.items() if isinstance(value, torch.Tensor))
    assert not (tmp_path / "new").exists()


def test_masks_that_can_not_be_imported_leave_the_model_alone():
    with pytest.raises(ModelError, match="nothing of the model is under torch.nn.utils.prune"):
        hfprune.import_torch_prune(MLP())
    model = Tied()
    prune.l1_unstructured(model.lower, "weight", 0.5)
    with pytest.raises(ModelError, match="'lower.weight' is masked and shares its values with 'upper.weight'"):
        hfprune.import_torch_prune(model)
    assert "lower.weight_orig" in dict(model.named_parameters(remove_duplicate=False))
    prune.custom_from_mask(model.upper, "weight", model.lower.weight_mask)
    masks = hfprune.import_torch_prune(model)
    assert model.lower.weight is model.upper.weight
    assert (list(masks), masks.zeros) == (["upper.weight"], 32)


@pytest.mark.parametrize("name", ["mlp", "bert"])
def test_files_with_masks_of_torch_are_converted(tmp_path, name):
    tiny, model = TINY[name], under_torch_prune(name)
    folder = tmp_path / "torch"
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    if name == "bert":
        model.config.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertForSequenceClassification"]}))
    build = tiny.build if tiny.kind == "own" else None
    with pytest.raises(CheckpointError, match="holds masks of torch.nn.utils.prune; `hfprune convert"):
        hfprune.from_pretrained(folder, build)
    for kind in ("dense", "bitmask"):
        done = CliRunner().invoke(app, ["convert", str(folder), str(tmp_path / kind), "--to", kind])
        assert done.exit_code == 0, done.output
        assert hfprune.verify(tmp_path / kind).zeros > 0
        again = hfprune.from_pretrained(tmp_path / kind, build)
        assert torch.equal(logits(again, tiny.batch()), logits(model, tiny.batch()))


def test_pickles_are_not_opened(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "weights.pt").write_bytes(b"\x80\x04")
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "torch"), str(tmp_path / "new"), "--to", "dense"])
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    assert (
        "weights.pt' is a pickle, which hfprune never opens; this makes a file that it reads: safetensors"
        in done.output
    )
