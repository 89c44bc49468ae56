"""Smaller, uneven models: they load again bit-identical, in every way that is promised."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    MixtralConfig,
    MixtralForCausalLM,
    RadioConfig,
    RadioModel,
    TimmWrapperForImageClassification,
    Trainer,
    TrainingArguments,
    ViTForImageClassification,
)

import hfprune
from hfprune import PruningConfig
from hfprune.checkpoint import read_block
from hfprune.checkpoint.metadata import annotate, block_of, plan_of
from hfprune.checkpoint.timm import wrap_timm
from hfprune.errors import CheckpointError
from hfprune.structure.plan import Plan
from tests.support import surgery
from tests.support.models import TINY, images, logits, same, snapshot, timm_vit
from tests.support.surgery import SMALL, Blocks, Surgery, no_masks

UNEVEN = [name for name, small in SMALL.items() if small.kind == "uneven"]
UNIFORM = [name for name, small in SMALL.items() if small.kind == "uniform"]
TIMM = [name for name, small in SMALL.items() if small.kind == "timm"]


@pytest.fixture
def save(tmp_path):
    """Saves a smaller model by its name: the model, the folder, a batch and what the model answers to it."""

    def saved(name, **options):
        model, batch = SMALL[name].build(), SMALL[name].batch()
        hfprune.save_pretrained(model, tmp_path / name, **options)
        return model, tmp_path / name, batch, logits(model, batch)

    return saved


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_saved_verified_loaded(save, name):
    model, folder, batch, expected = save(name)
    assert hfprune.verify(folder).ok
    again = hfprune.from_pretrained(folder, Blocks if SMALL[name].kind == "own" else None)
    assert not again.training
    assert torch.equal(logits(again, batch), expected)
    assert count(again) == count(model)
    assert plan_of(again) == plan_of(model) == Plan.from_dict(read_block(folder)["plan"])
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".py")]


@pytest.mark.parametrize("name", UNEVEN + UNIFORM)
def test_transformers_alone_loads_saves_and_loads_again(save, tmp_path, name):
    model, folder, batch, expected = save(name)
    marked = config_of(folder).get("quantization_config")
    assert marked == ({"quant_method": "hfprune"} if SMALL[name].kind == "uneven" else None)
    again = type(model).from_pretrained(folder)
    assert torch.equal(logits(again, batch), expected)
    again.save_pretrained(tmp_path / "again")
    assert config_of(tmp_path / "again") == config_of(folder)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "again"), batch), expected)
    left, right = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "again"))
    assert same(left, right)
    for attribute, value in vars(model.config).items():
        if attribute not in ("_name_or_path", "quantization_config", "transformers_version"):
            assert getattr(again.config, attribute) == value, attribute


@pytest.mark.parametrize("name", UNEVEN + UNIFORM)
def test_saved_by_transformers_alone(tmp_path, name):
    model, batch = SMALL[name].build(), SMALL[name].batch()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(hfprune.from_pretrained(tmp_path), batch), logits(model, batch))


@pytest.mark.parametrize("name", UNEVEN)
def test_modules_are_as_they_were(save, name):
    model, folder, _, _ = save(name)
    again = dict(type(model).from_pretrained(folder).named_modules())
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if type(value) in (int, float, tuple) and not key.startswith("_"):
                assert getattr(again[path], key) == value, (path, key)
        for key, value in module._buffers.items():
            assert torch.equal(again[path]._buffers[key], value)


def test_uniform_models_load_without_hfprune(save, tmp_path):
    lines = ["import sys, torch, transformers"]
    for name in UNIFORM:
        model, folder, batch, expected = save(name)
        torch_inputs = {key: value.tolist() for key, value in batch.items() if key != "labels"}
        lines += [
            f"model = transformers.{type(model).__name__}.from_pretrained({str(folder)!r})",
            f"batch = {{k: torch.tensor(v) for k, v in {torch_inputs!r}.items()}}",
            f"assert torch.equal(model(**batch).logits, torch.tensor({expected.tolist()!r})), {name!r}",
        ]
    lines.append("assert not [name for name in sys.modules if name.split('.')[0] == 'hfprune']")
    (tmp_path / "plain.py").write_text("\n".join(lines))
    done = subprocess.run([sys.executable, tmp_path / "plain.py"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_without_hfprune_an_uneven_model_is_refused(save, tmp_path):
    _, folder, _, _ = save("vit")
    code = f"import transformers; transformers.ViTForImageClassification.from_pretrained({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "mismatch" in done.stderr


@pytest.mark.parametrize("name", ["vit", "llama", "llama_rotary", "t5"])
def test_half_precision_device_map_and_shards(tmp_path, name):
    model, batch = SMALL[name].build().bfloat16(), SMALL[name].batch()
    hfprune.save_pretrained(model, tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert next(again.parameters()).dtype == torch.bfloat16
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    assert same(wanted, again.state_dict())
    if "rotary" not in name and name != "llama":  # a cast of the whole model rounds the frequencies, loading does not
        batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
        assert torch.equal(logits(again, batch), logits(model, batch))


@pytest.mark.parametrize("name", ["llama", "llama_tied", "llama_shallow_uneven", "llama_rotary", "gpt2", "t5"])
def test_generate(save, name):
    model, folder, batch, _ = save(name)
    again = type(model).from_pretrained(folder)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    left, right = (m.generate(batch["input_ids"], **options) for m in (model, again))
    assert torch.equal(left, right)


def test_tied_weights_stay_tied(save):
    for name in ("llama_tied", "gpt2"):
        model, folder, _, _ = save(name)
        again = type(model).from_pretrained(folder)
        assert again.lm_head.weight is again.get_input_embeddings().weight
        assert again.lm_head.in_features == again.get_input_embeddings().embedding_dim


@pytest.mark.parametrize("name", ["vit", "bert", "llama", "llama_rotary", "llama_shallow_uneven", "gpt2", "resnet"])
def test_without_its_head(save, tmp_path, name):
    model, folder, batch, _ = save(name)
    again = AutoModel.from_pretrained(folder)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        expected = model.base_model(**inputs)[0]
        assert torch.equal(again(**inputs)[0], expected)
        hfprune.save_pretrained(again, tmp_path / "backbone")
        assert torch.equal(AutoModel.from_pretrained(tmp_path / "backbone")(**inputs)[0], expected)


def test_a_backbone_gets_a_head(save, tmp_path):
    model, folder, batch, _ = save("vit")
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "backbone")
    again = ViTForImageClassification.from_pretrained(tmp_path / "backbone", num_labels=7)
    assert torch.equal(again.vit(batch["pixel_values"])[0], model.vit(batch["pixel_values"])[0])
    assert again.classifier.weight.shape == (7, 16)


@pytest.mark.parametrize("name", ["vit", "timm_vit"])
def test_another_number_of_classes(save, name):
    _, folder, batch, expected = save(name)
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForImageClassification.from_pretrained(folder, num_labels=7)
    again = AutoModelForImageClassification.from_pretrained(folder, num_labels=7, ignore_mismatched_sizes=True)
    assert logits(again, batch if isinstance(batch, dict) else {"pixel_values": batch[0]}).shape == (len(expected), 7)


@pytest.mark.parametrize("name", ["vit", "timm_vit"])
def test_what_is_loaded_is_an_ordinary_model(save, tmp_path, name):
    _, folder, _, _ = save(name)
    model = AutoModelForImageClassification.from_pretrained(folder)
    model.to("cpu", torch.float64).half().float()
    assert not getattr(model, "is_quantized", False)
    pixels, labels = images()
    rows = [{"pixel_values": p, "labels": label} for p, label in zip(pixels, labels, strict=True)]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=2, learning_rate=0.01, report_to="none", use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    assert not same(before, dict(model.state_dict()))
    trainer.save_model(tmp_path / "trained")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "trained")
    assert torch.equal(logits(again, {"pixel_values": pixels}), logits(model, {"pixel_values": pixels}))


@pytest.mark.parametrize("name", TIMM)
def test_timm(save, tmp_path, name):
    model, folder, batch, expected = save(name)
    assert config_of(folder)["architecture"] == model.pretrained_cfg["architecture"]
    for kind in (TimmWrapperForImageClassification, AutoModelForImageClassification):
        again = kind.from_pretrained(folder)
        assert torch.equal(logits(again, batch), expected)
    hfprune.save_pretrained(again, tmp_path / "again")
    assert torch.equal(logits(hfprune.from_pretrained(tmp_path / "again"), batch), expected)
    fresh = timm.create_model(f"local-dir:{folder}", pretrained=False)
    assert hfprune.from_pretrained(folder, fresh) is fresh
    assert torch.equal(logits(fresh, batch), expected)
    with pytest.raises(RuntimeError):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_a_wrapped_timm_model_cut_in_place(tmp_path):
    cut = Surgery(wrap_timm(timm_vit()))
    cut.linear(range(9), ["timm_model.blocks.1.mlp.fc1"], ["timm_model.blocks.1.mlp.fc2"])
    model, batch = cut.drop("timm_model.blocks.0").done(), images()
    expected = logits(model, batch)
    hfprune.save_pretrained(model, tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b"):
        again = AutoModelForImageClassification.from_pretrained(folder)
        assert torch.equal(logits(again, batch), expected)
    bare = hfprune.from_pretrained(tmp_path / "a", timm_vit())
    assert torch.equal(logits(bare, batch), expected)
    hfprune.save_pretrained(bare, tmp_path / "c")
    assert torch.equal(logits(hfprune.from_pretrained(tmp_path / "c"), batch), expected)


def test_timm_without_its_classifier(save):
    model, folder, (pixels, _), _ = save("timm_vit")
    with torch.no_grad():
        assert torch.equal(AutoModel.from_pretrained(folder)(pixels)[0], model.forward_features(pixels))


def test_own_modules_as_class_function_or_instance(save):
    model, folder, batch, expected = save("own")
    for given in (Blocks, lambda: Blocks(), Blocks()):
        again = hfprune.from_pretrained(folder, given)
        assert torch.equal(logits(again, batch), expected)
        assert block_of(again) == block_of(model)
        assert again.blocks[0].weight is again.blocks[2].weight
        assert again.width == 4
        assert again is given or not isinstance(given, nn.Module)


@pytest.mark.parametrize("name", ["own", "timm_vit"])
def test_an_instance_that_is_cut_already_is_filled(save, name):
    model, folder, batch, expected = save(name)
    with torch.no_grad():
        model.head.weight.zero_()
    assert hfprune.from_pretrained(folder, model, check=False) is model
    assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("other", [lambda: Blocks(width=4), lambda: TINY["cnn"].build(), lambda: nn.Linear(2, 2)])
def test_an_instance_that_does_not_fit_is_left_as_it_was(save, other):
    _, folder, _, _ = save("own")
    model = other()
    before, facts = snapshot(model), {path: dict(vars(module)) for path, module in model.named_modules()}
    with pytest.raises(CheckpointError) as error:
        hfprune.from_pretrained(folder, model)
    assert str(error.value).startswith(f"'{folder}' does not fit {type(model).__name__}: ")
    assert same(before, snapshot(model))
    for path, module in model.named_modules():
        assert {k: v for k, v in vars(module).items() if not k.startswith("_")} == {
            k: v for k, v in facts[path].items() if not k.startswith("_")
        }


@pytest.mark.parametrize("name", ["vit", "llama", "timm_vit", "own"])
def test_masks_beside_a_plan(tmp_path, name):
    model, batch = SMALL[name].build(), SMALL[name].batch()
    plan = plan_of(model)
    report = hfprune.prune(model, PruningConfig(target=0.5))
    assert plan_of(model) == plan
    hfprune.save_pretrained(model, tmp_path)
    assert hfprune.verify(tmp_path).zeros == report.masks.zeros > 0
    again = hfprune.from_pretrained(tmp_path, Blocks if name == "own" else None)
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert plan_of(again) == plan


def test_cut_twice(tmp_path):
    """The second plan is again one from the dense model to the smallest, and the dense config is not forgotten."""
    model = surgery.llama_shallow()
    assert plan_of(model).dense_config == {"num_hidden_layers": 4}
    cut = Surgery(AutoModelForCausalLM.from_pretrained(_saved(model, tmp_path / "once")))
    for i in range(2):
        path = f"model.layers.{i}.mlp"
        cut.linear([1, 4], [f"{path}.gate_proj", f"{path}.up_proj"], [f"{path}.down_proj"])
    cut.plan.dropped = plan_of(model).dropped
    model = cut.config(intermediate_size=2).done()
    assert plan_of(model).config == {"num_hidden_layers": 2, "intermediate_size": 2}
    assert plan_of(model).dense_config == {"num_hidden_layers": 4, "intermediate_size": 24}
    again = AutoModelForCausalLM.from_pretrained(_saved(model, tmp_path / "twice"))
    assert torch.equal(logits(again, TINY["llama"].batch()), logits(model, TINY["llama"].batch()))
    assert "quantization_config" not in config_of(tmp_path / "twice")


def _saved(model, folder):
    return hfprune.save_pretrained(model, folder)


def test_experts_that_are_joined_while_loading(tmp_path):
    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=16,
    )  # fmt: skip
    cut, path = Surgery(MixtralForCausalLM(config)), "model.layers.0.mlp.experts"
    cut.keep([*range(12), *range(24, 36)], f"{path}.gate_up_proj@1").keep(range(12), f"{path}.down_proj@2")
    model, batch = cut.set(path, intermediate_dim=12).done(), TINY["llama"].batch()
    hfprune.save_pretrained(model, tmp_path)
    assert f"{path.replace('mlp', 'block_sparse_moe')}.1.w2.weight" in load_file(tmp_path / "model.safetensors")
    again = MixtralForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, batch), logits(model, batch))


def radio(*projections):
    """A model whose queries, keys and values are one tensor on disk, in three equal parts."""
    config = RadioConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2.0, image_size=32)
    cut, path = Surgery(RadioModel(config)), "encoder.layer.0.attention"
    cut.linear(range(8), [f"{path}.{name}_proj" for name in projections], [f"{path}.o_proj"])
    return cut.done()


def test_joined_projections(tmp_path):
    model, (pixels, _) = radio("q", "k", "v"), images(size=32)
    hfprune.save_pretrained(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(RadioModel.from_pretrained(tmp_path)(pixels)[0], model(pixels)[0])


def test_projections_that_can_not_be_taken_apart_again_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="would not load again: ") as error:
        hfprune.save_pretrained(radio("q", "k"), tmp_path / "new")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("forgotten", ["attributes", "dropped"])
def test_a_plan_that_is_not_whole_is_refused_before_anything_is_written(tmp_path, forgotten):
    model = surgery.bert() if forgotten == "attributes" else surgery.llama_shallow_uneven()
    plan = plan_of(model)
    if forgotten == "attributes":
        del plan.attributes["bert.encoder.layer.1.attention.self"]["all_head_size"]
    else:
        plan.dropped = plan.dropped[:1]
    annotate(model, PruningConfig(target=0.5), no_masks(model), 0.5, plan=plan)
    with pytest.raises(CheckpointError, match="would not load again: "):
        hfprune.save_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_folder_before_stays_when_a_model_is_refused(save):
    model, folder, batch, expected = save("vit")
    block_of(model)["plan"]["attributes"] = {"vit.layers.9": {"x": 1}}
    with pytest.raises(CheckpointError, match=r"'vit\.layers\.9'"):
        hfprune.save_pretrained(model, folder)
    assert torch.equal(logits(hfprune.from_pretrained(folder), batch), expected)
