"""Checkpoints: they load again bit-identical, say their sparsity, and refuse what does not match."""

import json
import re
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, ViTForImageClassification

import hfprune
from hfprune import PruningConfig
from hfprune.checkpoint import read_block
from hfprune.checkpoint.metadata import block_of, masks_from_block
from hfprune.checkpoint.timm import wrap_timm
from hfprune.errors import CheckpointError
from tests.support.models import (
    CNN,
    MLP,
    TINY,
    Tied,
    gpt2,
    images,
    llama,
    logits,
    timm_coat,
    timm_vit,
    vectors,
    vit,
)

HALF = PruningConfig(target=0.5)


def pruned(name, config=HALF):
    model = TINY[name].build().eval()
    return model, hfprune.prune(model, config)


def refusal(action, *arguments, **options):
    with pytest.raises(CheckpointError) as error:
        action(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def edit(folder, change):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def retouch(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("granularity", ["weight", "2:4"])
@pytest.mark.parametrize("name", TINY)
def test_saved_verified_loaded(tmp_path, name, granularity):
    model, report = pruned(name, PruningConfig(granularity=granularity, target=0.5))
    assert hfprune.save_pretrained(model, tmp_path) == tmp_path
    found = hfprune.verify(tmp_path)
    assert found.ok
    assert found.problems == []
    assert (found.tensors, found.zeros) == (len(report.masks), report.masks.zeros)
    assert found.numel == report.masks.numel
    again = hfprune.from_pretrained(tmp_path, TINY[name].build if TINY[name].kind == "own" else None)
    assert not again.training
    assert torch.equal(logits(again, TINY[name].batch()), logits(model, TINY[name].batch()))
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", TINY)
def test_saved_twice_is_saved_alike(tmp_path, name):
    model, report = pruned(name)
    hfprune.save_pretrained(model, tmp_path / "a")
    assert masks_from_block(model, block_of(model)).digest() == report.masks.digest()
    hfprune.save_pretrained(model, tmp_path / "b", masks=report.masks)
    assert read_block(tmp_path / "a") == read_block(tmp_path / "b")
    assert hfprune.verify(tmp_path / "b").tensors == len(report.masks)


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "llama"])
def test_transformers_by_itself_carries_the_block(tmp_path, name):
    model, report = pruned(name)
    model.save_pretrained(tmp_path)
    assert hfprune.verify(tmp_path).ok
    assert hfprune.verify(tmp_path).zeros == report.masks.zeros
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config.hfprune == read_block(tmp_path)
    assert torch.equal(logits(again, TINY[name].batch()), logits(model, TINY[name].batch()))
    again.save_pretrained(tmp_path / "again")
    assert read_block(tmp_path / "again") == read_block(tmp_path)


def test_the_block_says_what_was_done(tmp_path):
    config = PruningConfig(
        criterion={"name": "l2", "batches": 2}, target=0.5, schedule={"kind": "hybrid", "steps": 2, "first": 0.2}
    )
    model, report = pruned("vit", config)
    hfprune.save_pretrained(model, tmp_path)
    block = json.loads((tmp_path / "config.json").read_text())["hfprune"]
    assert block["format_version"] == 1
    assert block["version"] == hfprune.__version__
    assert block["pruning"]["criterion"] == {"name": "l2", "batches": 2}
    assert block["pruning"]["schedule"] == {"kind": "hybrid", "steps": 2, "first": 0.2}
    assert block["pruning"]["target"] == block["pruning"]["reached"] == {"ratio": 0.5}
    assert sum(record["zeros"] for record in block["sparsity"].values()) == report.masks.zeros
    assert set(block["sparsity"]) <= set(load_file(tmp_path / "model.safetensors"))


def test_names_on_disk_are_those_of_the_file(tmp_path):
    model, report = pruned("vit")
    hfprune.save_pretrained(model, tmp_path)
    recorded = set(read_block(tmp_path)["sparsity"])
    assert recorded <= set(load_file(tmp_path / "model.safetensors"))
    assert recorded != set(report.masks)  # ViT's tensors bear other names on disk


@pytest.mark.parametrize("include", [["lm_head"], ["*.wte"], ["*"]])
def test_a_tied_embedding(tmp_path, include):
    model = gpt2()
    report = hfprune.prune(model, PruningConfig(target=0.5, include=include))
    hfprune.save_pretrained(model, tmp_path)
    assert hfprune.verify(tmp_path).zeros == report.masks.zeros
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert masks_from_block(again, again.config.hfprune).digest() == report.masks.digest()


def test_grouped_query_heads_in_half_precision(tmp_path):
    model = llama(tie_word_embeddings=True).bfloat16()
    report = hfprune.prune(model, PruningConfig(granularity="2:4"))
    hfprune.save_pretrained(model, tmp_path)
    again = hfprune.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert next(again.parameters()).dtype == torch.bfloat16
    batch = TINY["llama"].batch()
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert hfprune.verify(tmp_path).zeros >= report.masks.zeros


@pytest.mark.parametrize("name", ["timm_vit", "timm_resnet"])
def test_timm_loads_in_both_libraries(tmp_path, name):
    model, _ = pruned(name)
    hfprune.save_pretrained(model, tmp_path)
    batch = TINY[name].batch()
    expected = logits(model, batch)
    assert torch.equal(logits(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), batch), expected)
    wrapped = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(wrapped, batch), expected)
    assert wrapped.config.hfprune == read_block(tmp_path)
    hfprune.save_pretrained(wrapped, tmp_path / "again")
    assert hfprune.verify(tmp_path / "again").ok
    assert read_block(tmp_path / "again")["sparsity"] == read_block(tmp_path)["sparsity"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_timm_model_that_shares_tensors(tmp_path, wrapped):
    model = timm_coat()
    hfprune.prune(model, PruningConfig(target=0.5))
    pictures = images(size=32)[0]
    expected = model(pictures)
    hfprune.save_pretrained(wrap_timm(model) if wrapped else model, tmp_path)
    assert hfprune.verify(tmp_path).ok
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(pictures), expected)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(pictures).logits, expected)


def test_own_modules_as_class_function_or_instance(tmp_path):
    model, report = pruned("cnn")
    hfprune.save_pretrained(model, tmp_path)
    for given in (CNN, lambda: CNN(), CNN()):
        again = hfprune.from_pretrained(tmp_path, given)
        assert torch.equal(logits(again, images()), logits(model, images()))
        assert block_of(again) == block_of(model)
        assert masks_from_block(again, block_of(again)).digest() == report.masks.digest()
        if isinstance(given, nn.Module):
            assert again is given
    assert refusal(hfprune.from_pretrained, tmp_path) == (
        f"'{tmp_path}' holds tests.support.models:CNN: give its class or a fresh instance as `model`"
    )


def test_a_model_that_does_not_fit_is_left_as_it_was(tmp_path):
    model, _ = pruned("mlp")
    hfprune.save_pretrained(model, tmp_path)
    for other in (CNN(), MLP(width=13), Tied(), nn.Sequential(MLP()), nn.Linear(1, 1)):
        before = [value.clone() for value in other.state_dict().values()]
        message = refusal(hfprune.from_pretrained, tmp_path, other)
        assert message.startswith(f"'{tmp_path}' does not fit {type(other).__name__}: ")
        assert all(torch.equal(a, b) for a, b in zip(before, other.state_dict().values(), strict=True))


def test_tied_own_modules(tmp_path):
    model, report = pruned("tied")
    hfprune.save_pretrained(model, tmp_path)
    assert hfprune.verify(tmp_path).zeros == report.masks.zeros
    again = hfprune.from_pretrained(tmp_path, Tied)
    assert again.lower.weight is again.upper.weight
    assert torch.equal(logits(again, vectors()), logits(model, vectors()))


def test_a_dense_model(tmp_path):
    model = MLP()
    hfprune.save_pretrained(model, tmp_path)
    assert read_block(tmp_path) is None
    assert hfprune.verify(tmp_path) == hfprune.checkpoint.Verification()
    again = hfprune.from_pretrained(tmp_path, MLP)
    assert torch.equal(logits(again, vectors()), logits(model, vectors()))


def test_channels_last(tmp_path):
    model = CNN().to(memory_format=torch.channels_last).eval()
    hfprune.prune(model, HALF)
    hfprune.save_pretrained(model, tmp_path)
    assert hfprune.verify(tmp_path).ok
    again = hfprune.from_pretrained(tmp_path, CNN)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_saving_changes_nothing(tmp_path):
    model, _ = pruned("gpt2")
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    hfprune.save_pretrained(model, tmp_path)
    for name, value in model.state_dict().items():
        assert value.data_ptr() == before[name][0]
        assert torch.equal(value, before[name][1])


def test_trained_further_the_zeros_are_counted_anew(tmp_path):
    model, report = pruned("cnn")
    with torch.no_grad():
        model.conv1.weight.add_(torch.rand_like(model.conv1.weight))
    report.masks.enforce()
    report.masks.clean()
    hfprune.save_pretrained(model, tmp_path)
    assert hfprune.verify(tmp_path).zeros == report.masks.zeros


@pytest.fixture
def sharded(tmp_path):
    model, _ = pruned("llama")
    hfprune.save_pretrained(model, tmp_path / "sharded", max_shard_size="8KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    return model, tmp_path / "sharded"


def test_shards(sharded):
    model, folder = sharded
    assert hfprune.verify(folder).ok
    assert hfprune.verify(folder).zeros
    batch = TINY["llama"].batch()
    assert torch.equal(logits(hfprune.from_pretrained(folder), batch), logits(model, batch))


def test_a_missing_shard(sharded):
    _, folder = sharded
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    expected = f"'{folder}' is not a whole checkpoint: '{gone.name}' is missing"
    assert refusal(hfprune.verify, folder) == expected
    assert refusal(hfprune.from_pretrained, folder) == expected


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ""])
def test_an_index_that_points_elsewhere(sharded, name):
    _, folder = sharded
    (folder.parent / "x.safetensors").write_bytes(b"")
    (folder / "sub").mkdir()
    (folder / "sub" / "x.safetensors").write_bytes(b"")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    path.write_text(json.dumps(index))
    assert refusal(hfprune.verify, folder) == f"'{folder}' is not a whole checkpoint: '{name}' is missing"


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_can_not_be_read(sharded, text):
    _, folder = sharded
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refusal(hfprune.verify, folder)


def test_one_file_after_shards_and_shards_after_one_file(tmp_path):
    batch = TINY["llama"].batch()
    for order in ((None, "8KB"), ("8KB", None), ("8KB", "16KB")):
        folder = tmp_path / str(order[0])
        for size, ratio in zip(order, (0.3, 0.7), strict=True):
            model, report = pruned("llama", PruningConfig(target=ratio))
            hfprune.save_pretrained(model, folder, **({"max_shard_size": size} if size else {}))
        assert hfprune.verify(folder).zeros == report.masks.zeros
        again = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(logits(again, batch), logits(model, batch))
        shutil.rmtree(folder)


def test_other_files_in_the_folder_stay(tmp_path):
    (tmp_path / "notes").mkdir()
    for name in ("README.md", "notes/model.safetensors", "optimizer.safetensors"):
        (tmp_path / name).write_text("mine")
    hfprune.save_pretrained(pruned("mlp")[0], tmp_path)
    for name in ("README.md", "notes/model.safetensors", "optimizer.safetensors"):
        assert (tmp_path / name).read_text() == "mine"


@pytest.fixture
def folder(tmp_path):
    hfprune.save_pretrained(pruned("vit")[0], tmp_path / "vit")
    return tmp_path / "vit"


def first(folder):
    return next(name for name, record in read_block(folder)["sparsity"].items() if record["zeros"])


def test_a_zero_that_no_longer_is(folder):
    name = first(folder)
    count = read_block(folder)["sparsity"][name]["zeros"]

    def change(tensors):
        flat = tensors[name].view(-1)
        flat[(flat == 0).nonzero()[0]] = 1e-20

    retouch(folder, change)
    problem = f"'{name}' has {count - 1} zeros, {count} are recorded: 1 that were zero no longer are"
    assert hfprune.verify(folder).problems == [problem]
    assert not hfprune.verify(folder).ok
    assert refusal(hfprune.from_pretrained, folder) == f"'{folder}' does not match its metadata: {problem}"
    assert hfprune.from_pretrained(folder, check=False) is not None


def test_zeros_beyond_those_recorded_are_counted_and_no_harm(folder):
    name = first(folder)

    def change(tensors):
        flat = tensors[name].view(-1)
        flat[flat.nonzero()[:3]] = 0.0

    assert hfprune.verify(folder).more_zeros == 0
    retouch(folder, change)
    assert hfprune.verify(folder).ok
    assert hfprune.verify(folder).more_zeros == 3


def test_zeros_in_other_places(folder):
    name = first(folder)
    retouch(folder, lambda tensors: tensors.update({name: tensors[name].flip(0).contiguous()}))
    assert hfprune.verify(folder).problems == [f"'{name}' has as many zeros as recorded, but in other places"]


def test_a_tensor_of_another_size_or_gone(folder):
    name = first(folder)
    retouch(folder, lambda tensors: tensors.update({name: tensors[name][:1].clone()}))
    assert "elements" in hfprune.verify(folder).problems[0]
    retouch(folder, lambda tensors: tensors.pop(name))
    assert hfprune.verify(folder).problems == [f"'{name}' is recorded, but no file holds it"]


def test_several_problems_are_counted(folder):
    retouch(folder, lambda tensors: tensors.update({n: torch.ones_like(t) for n, t in tensors.items()}))
    problems = hfprune.verify(folder).problems
    assert len(problems) == len(read_block(folder)["sparsity"])
    assert refusal(hfprune.from_pretrained, folder).endswith(f"(and {len(problems) - 1} more)")


@pytest.mark.parametrize("left", [0, 5, 200, -10])
def test_a_truncated_file(folder, left):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    assert refusal(hfprune.verify, folder).startswith(f"'{path}' is damaged: ")
    assert refusal(hfprune.from_pretrained, folder).startswith(f"'{path}' is damaged: ")


def test_a_missing_file(folder):
    (folder / "model.safetensors").unlink()
    assert refusal(hfprune.verify, folder) == f"'{folder}' is not a whole checkpoint: 'model.safetensors' is missing"


def test_a_newer_format(folder):
    edit(folder, lambda values: values["hfprune"].update(format_version=4))
    expected = f"{folder}/config.json: written in format 4, and this version reads up to 3; upgrade hfprune"
    for action in (hfprune.verify, hfprune.from_pretrained, read_block):
        assert refusal(action, folder) == expected


@pytest.mark.parametrize("block", [{}, [], 3, {"format_version": "1"}, {"format_version": True}])
def test_a_block_without_a_version(folder, block):
    edit(folder, lambda values: values.update(hfprune=block))
    assert refusal(hfprune.verify, folder) == f"{folder}/config.json: the block 'hfprune' has no format_version"


@pytest.mark.parametrize("sparsity", [[], {"a": 3}, {"a": {}}, {"a": {"zeros": "1", "numel": 2, "sha256": ""}}])
def test_a_block_with_malformed_records(folder, sparsity):
    edit(folder, lambda values: values["hfprune"].update(sparsity=sparsity))
    assert refusal(hfprune.verify, folder).startswith(f"{folder}/config.json: the block 'hfprune' ")


def test_no_config(folder, tmp_path):
    (folder / "config.json").unlink()
    for place in (folder, tmp_path / "nowhere"):
        for action in (hfprune.verify, hfprune.from_pretrained):
            assert refusal(action, place) == f"'{place}' is not a checkpoint: it holds no config.json"


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\x00"])
def test_a_config_that_can_not_be_read(folder, text):
    (folder / "config.json").write_text(text)
    for action in (hfprune.verify, hfprune.from_pretrained):
        assert re.match(re.escape(f"{folder}/config.json") + " can't be read: ", refusal(action, folder))


def test_an_architecture_that_transformers_does_not_have(folder):
    edit(folder, lambda values: values.update(architectures=["VitForNothing"]))
    assert "'VitForNothing', which transformers does not have" in refusal(hfprune.from_pretrained, folder)
    assert isinstance(hfprune.from_pretrained(folder, ViTForImageClassification), ViTForImageClassification)


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "x").write_text("")
    assert refusal(hfprune.save_pretrained, MLP(), tmp_path / "x") == f"'{tmp_path / 'x'}' is a file, not a folder"
    assert refusal(hfprune.save_pretrained, MLP(), tmp_path / "x" / "y").startswith("can't write to ")


def test_a_mask_that_is_not_the_models(tmp_path):
    masks = hfprune.prune(CNN(), HALF).masks
    model = timm_vit()
    hfprune.prune(model, HALF)
    assert refusal(hfprune.save_pretrained, model, tmp_path / "new", masks=masks).startswith("a mask is held for ")
    assert not (tmp_path / "new").exists()
    assert vit().config.to_dict().get("hfprune") is None
