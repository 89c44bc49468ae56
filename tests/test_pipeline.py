"""run(): from a recipe to a folder that loads again, through every kind of model and data that needs no network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from rich.console import Console
from transformers import AutoModelForImageClassification

import hfprune
from hfprune import Recipe
from hfprune.errors import CheckpointError, ConfigError
from hfprune.folders import reserved
from hfprune.pipeline import run
from tests.support.cards import load_as_the_card_says


def recipe_values(folder: Path, **sections) -> dict:
    """A recipe on the digits that takes a second; `sections` are merged into it."""
    values = {
        "model": {
            "name": "timm/vit_tiny_patch16_224",
            "pretrained": False,
            "args": {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2},
        },
        "data": {"name": "digits", "train_samples": 64, "eval_samples": 32, "augment": False},
        "baseline": {"epochs": 2},
        "pruning": {
            "target": 0.5,
            "schedule": {"kind": "hybrid", "steps": 1},
            "recovery": {"epochs": 2, "patience": 1},
        },
        "training": {"per_device_train_batch_size": 16, "learning_rate": 1e-3, "seed": 3, "disable_tqdm": True},
        "output": {"folder": str(folder), "batch_sizes": [1, 2]},
    }
    for name, section in sections.items():
        if section is None:
            values.pop(name)
        else:
            values[name] = {**values.get(name, {}), **section}
    return values


def quiet() -> Console:
    return Console(file=open("/dev/null", "w"), width=120)  # noqa: SIM115


def run_recipe(folder: Path, resume: bool = False, **sections) -> dict:
    return run(Recipe.parse(recipe_values(folder, **sections)), resume=resume, console=quiet())


def test_a_run_leaves_everything_behind(tmp_path):
    folder = tmp_path / "run"
    report = run_recipe(folder)
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "model.safetensors",
        "config.json",
        "README.md",
        "recipe.yaml",
        "pruning_report.json",
        "sparsity.png",
        "trajectory.png",
        "dense",
    }
    assert not [name for name in names if name.startswith(".")]
    assert json.loads((folder / "pruning_report.json").read_text()) == json.loads(json.dumps(report))
    for side in ("dense", "pruned"):
        assert set(report[side]["metric"]) == {"loss", "accuracy"}
        assert set(report[side]["latency_ms"]) == {"1", "2"}
        assert report[side]["params"] == report["dense"]["params"]
    zeros = sum(record["zeros"] for record in report["sparsity"].values())
    total = sum(record["numel"] for record in report["sparsity"].values())
    assert zeros == round(0.5 * total)
    assert report["pruned"]["nonzero"] <= report["dense"]["nonzero"] - zeros + 1
    assert [step["target"] for step in report["steps"]] == pytest.approx([0.375, 0.5])
    assert hfprune.verify(folder).ok
    for picture in ("sparsity.png", "trajectory.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    card = (folder / "README.md").read_text()
    assert "sparsity.png" in card and "learning_rate: 0.001" in card and "model-index" in card


def test_the_result_loads_in_transformers_and_timm(tmp_path):
    import timm

    folder = tmp_path / "run"
    run_recipe(folder)
    images = torch.rand(4, 1, 8, 8)
    logits = AutoModelForImageClassification.from_pretrained(folder).eval()(images).logits
    assert torch.equal(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images), logits)
    assert torch.equal(hfprune.from_pretrained(folder)(images).logits, logits)


def test_the_saved_recipe_gives_the_same_result(tmp_path):
    first = run_recipe(tmp_path / "first")
    recipe = Recipe.from_yaml(tmp_path / "first" / "recipe.yaml", [f"output.folder={tmp_path / 'second'}"])
    second = run(recipe, console=quiet())
    assert second["sparsity"] == first["sparsity"]
    assert second["pruned"]["metric"] == first["pruned"]["metric"]
    assert second["dense"]["metric"] == first["dense"]["metric"]


def test_an_own_module_by_its_function(tmp_path, monkeypatch):
    (tmp_path / "own_digits_net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, width=8):\n"
        "        super().__init__()\n"
        "        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))\n"
        "    def forward(self, x):\n"
        "        return self.body(x)\n"
        "def make(width=8):\n"
        "    return Net(width)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "run"
    data = {"image_size": 8}
    report = run_recipe(
        folder, model={"name": "own_digits_net:make", "args": {"width": 12}, "pretrained": True}, data=data
    )
    assert report["pruned"]["params"] == 64 * 12 + 12 + 12 * 10 + 10
    monkeypatch.chdir(tmp_path)
    loaded = load_as_the_card_says(folder / "README.md")["model"]
    assert loaded(torch.rand(2, 1, 8, 8)).shape == (2, 10) and loaded.body[1].out_features == 12
    assert "from own_digits_net import make" in (folder / "README.md").read_text()


def test_without_a_baseline_the_model_is_pruned_as_it_is(tmp_path):
    first = tmp_path / "first"
    run_recipe(first)
    report = run_recipe(
        tmp_path / "second",
        model={"name": str(first / "dense"), "args": {}, "pretrained": True},
        baseline=None,
        pruning={"criterion": "taylor"},
    )
    dense = json.loads((first / "dense" / "dense.json").read_text())
    assert report["dense"]["metric"] == pytest.approx(dense["metric"], abs=1e-6)
    assert not (tmp_path / "second" / "dense").exists()


def test_the_card_says_where_the_model_comes_from_in_ones_own_template(tmp_path):
    import timm

    sizes = {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4], "stem_width": 4, "in_chans": 1, "num_classes": 10}
    timm.models.save_for_hf(timm.create_model("resnet18", **sizes), str(tmp_path / "dense"), safe_serialization=True)
    (tmp_path / "dense" / "README.md").write_text("---\nlicense: mit\nlanguage: en\ndatasets: [mnist]\n---\n")
    (tmp_path / "own.jinja").write_text("---\n{{ card_data }}\n---\n# {{ name }}, mine\n\n{{ loading }}\n")
    report = run_recipe(
        tmp_path / "run",
        model={"name": str(tmp_path / "dense"), "args": {}, "pretrained": True},
        data={"image_size": 32},
        baseline=None,
        pruning={"target": 0.9},
        output={"template": str(tmp_path / "own.jinja"), "sparse": "bitmask"},
    )
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert (card.data.license, card.data.language, card.data.datasets) == ("mit", ["en"], ["mnist"])
    assert card.text.startswith("# run, mine\n") and "import hfprune\n" in card.text
    stored = sum(path.stat().st_size for path in (tmp_path / "run").glob("*.safetensors"))
    assert report["pruned"]["bytes"] == stored < report["dense"]["bytes"]


def test_an_earlier_run_is_moved_aside_and_kept(tmp_path):
    folder = tmp_path / "run"
    run_recipe(folder)
    card = (folder / "README.md").read_text()
    run_recipe(folder, training={"seed": 4})
    run_recipe(folder, training={"seed": 5})
    assert (folder / "previous" / "1" / "README.md").read_text() == card
    assert (folder / "previous" / "2" / "model.safetensors").is_file()


def test_resuming_an_ended_run_shows_it_again(tmp_path):
    folder = tmp_path / "run"
    report = run_recipe(folder)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert run_recipe(folder, resume=True) == json.loads(json.dumps(report))
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_a_result_that_was_only_half_moved_into_place_is_made_again(tmp_path):
    folder = tmp_path / "run"
    report = run_recipe(folder)
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    again = run_recipe(folder, resume=True)
    assert again["sparsity"] == report["sparsity"]
    assert hfprune.verify(folder).ok


def test_the_baselines_epochs_hold_beside_the_trainings_max_steps(tmp_path):
    run_recipe(tmp_path, training={"max_steps": 1}, baseline={"epochs": 3}, pruning={"recovery": {"steps": 2}})
    log = json.loads((tmp_path / "dense" / "dense.json").read_text())
    assert log["optimizer_steps"] == 12


def test_the_baseline_watches_what_the_run_watches(tmp_path):
    report = run_recipe(tmp_path, training={"save_strategy": "best"})
    assert set(report["dense"]["metric"]) == {"loss", "accuracy"}


def test_the_baseline_may_train_in_another_precision(tmp_path):
    report = run_recipe(tmp_path, baseline={"epochs": 1, "bf16": True})
    assert report["pruned"]["metric"]["loss"] < 10


def test_label_smoothing_needs_a_config(tmp_path):
    sections = {"model": {"name": "torch.nn:Flatten", "args": {}}, "training": {"label_smoothing_factor": 0.1}}
    with pytest.raises(ConfigError, match="training.label_smoothing_factor: needs a model that has a config"):
        run_recipe(tmp_path / "run", **sections)


def test_resuming_with_another_recipe_names_the_key(tmp_path):
    folder = tmp_path / "run"
    run_recipe(folder)
    with pytest.raises(ConfigError, match="pruning.target.ratio: 0.6 now, but .* was begun with 0.5"):
        run_recipe(folder, resume=True, pruning={"target": 0.6})


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output.folder: '.*file' is a file"):
        run_recipe(tmp_path / "file")
    with pytest.raises(CheckpointError, match="output.folder: can't write to '/proc/hfprune'"):
        run_recipe(Path("/proc/hfprune"))


def test_failing_to_write_the_result_leaves_nothing_half_done(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hfprune.pipeline.trajectory_plot", full)
    folder = tmp_path / "run"
    with pytest.raises(CheckpointError, match="could not write .*No space left"):
        run_recipe(folder)
    assert not (folder / "model.safetensors").exists()
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    monkeypatch.undo()
    run_recipe(folder, resume=True)
    assert hfprune.verify(folder).ok


BAD = [
    ({"output": {"template": "no_such.jinja"}}, "the card's template 'no_such.jinja' can't be read"),
    ({"training": {"learnig_rate": 1}}, "training.learnig_rate: unknown key; did you mean 'learning_rate'"),
    ({"training": {"learning_rate": "fast"}}, "training.learning_rate: input should be a valid number.* not 'fast'"),
    ({"training": {"output_dir": "x"}}, "training.output_dir: .* use output.folder"),
    ({"baseline": {"epochs": 1, "sed": 2}}, "baseline.sed: unknown key; did you mean 'seed'"),
    ({"training": {"optim": "adamw_torc"}}, "training.optim: unknown 'adamw_torc'; did you mean 'adamw_torch'"),
    ({"baseline": {"epochs": 1, "optim": "sgf"}}, "baseline.optim: unknown 'sgf'; did you mean 'sgd'"),
    ({"training": {"lr_scheduler_type": "cosin"}}, "training.lr_scheduler_type: .*did you mean 'cosine'"),
    ({"training": {"lr_scheduler_kwargs": {"foo": 1}}}, "training.lr_scheduler_kwargs: .*'foo'"),
    ({"training": {"lr_scheduler_type": "warmup_stable_decay"}}, "training.lr_scheduler_type: .*num_decay_steps"),
    ({"training": {"learning_rate": "1e-3"}}, "training.learning_rate: .* not '1e-3'; write 0.001, without quotes"),
    ({"training": {"learning_rate": False}}, "training.learning_rate: input should be a valid number, not False"),
    ({"training": {"bf16": "yes"}}, "training.bf16: .* valid boolean, not 'yes'; write true, without quotes"),
    ({"training": {"weight_decay": float("inf")}}, "training.weight_decay: must be a finite number, not inf"),
    ({"training": {"label_smoothing_factor": 2}}, "training.label_smoothing_factor: must be at most 1, not 2"),
    ({"training": {"eval_accumulation_steps": 0}}, "training.eval_accumulation_steps: must be at least 1, not 0"),
    ({"training": {"torch_compile_backend": "inducto"}}, "torch_compile_backend: .*did you mean 'inductor'"),
    ({"training": {"torch_compile_mode": "defalt"}}, "torch_compile_mode: .*did you mean 'default'"),
    ({"training": {"fsdp": True}}, "training.fsdp: .*distributed"),
    ({"training": {"fp16": True, "bf16": True}}, "training.bf16: .*not both"),
    ({"training": {"neftune_noise_alpha": 5}}, "training.neftune_noise_alpha: adds noise to embeddings"),
    ({"training": {"train_sampling_strategy": "group_by_length"}}, "train_sampling_strategy: .*images have no length"),
    ({"training": {"train_sampling_strategy": "by_length"}}, "train_sampling_strategy: .*did you mean"),
    ({"training": {"label_names": ["foo"]}}, "training.label_names: .*'labels'; leave it out"),
    ({"training": {"dataloader_persistent_workers": True}}, "persistent_workers: .*set dataloader_num_workers too"),
    ({"training": {"eval_do_concat_batches": False}}, "training.eval_do_concat_batches: .*leave it out"),
    ({"training": {"prediction_loss_only": True}}, "training.prediction_loss_only: .*leave it out"),
    (
        {"training": {"dataloader_drop_last": True, "per_device_train_batch_size": 65}},
        "training.dataloader_drop_last: 64 training rows do not fill one batch of 65",
    ),
    (
        {"baseline": {"epochs": 1, "dataloader_drop_last": True, "per_device_train_batch_size": 65}},
        "baseline.dataloader_drop_last: 64 training rows",
    ),
    ({"baseline": {"epochs": "abc"}}, "baseline.epochs: input should be a valid number, not 'abc'"),
    ({"baseline": {"epochs": float("inf")}}, "baseline.epochs: must be a finite number, not inf"),
    ({"baseline": {"epochs": 1, "metric_for_best_model": "acc"}}, "baseline.metric_for_best_model: 'acc' is not mea"),
    ({"data": {"label_column": "image"}}, "data.label_column: 'image' is the column of the image; name another"),
    ({"pruning": {"criterion": "magnitude"}}, "pruning.criterion: unknown criterion 'magnitude'; "),
    ({"pruning": {"criterion": {"name": "taylor", "batch": 3}}}, "pruning.criterion.batch: .*did you mean 'batches'"),
    ({"pruning": {"include": ["blocks.0.mpl.*"]}}, "pruning.include: 'blocks.0.mpl.\\*' matches nothing.*did you mean"),
    ({"pruning": {"min_kept": 0.6}}, "pruning.target.ratio: 0.5 can't be reached with min_kept 0.6; at most 0."),
    ({"data": {"metrics": ["acuracy"]}}, "data.metrics: .*accuracy"),
    ({"training": {"learning_rate": -1}}, "training.learning_rate: must be at least 0, not -1"),
    ({"training": {"seed": -5}}, "training.seed: must be at least 0, not -5"),
    ({"training": {"per_device_train_batch_size": 0}}, "training.per_device_train_batch_size: must be at least 1"),
    ({"training": {"optim": "sgd", "optim_args": "foo"}}, "training.optim_args: "),
    ({"training": {"report_to": "clearml"}}, "training.*: .*[cC]lear[mM][lL]"),
    ({"training": {"metric_for_best_model": "acuracy"}}, "metric_for_best_model: 'acuracy' is not measured; did you"),
    ({"pruning": {"recovery": {"monitor": "acuracy"}}}, "recovery.monitor: 'acuracy' is not measured; did you mean"),
    ({"pruning": {"granularity": "512:1024"}}, "no layer's input dimension holds a group of 1024"),
]


@pytest.mark.parametrize(("sections", "message"), BAD, ids=[str(list(section.items())) for section, _ in BAD])
def test_bad_recipes_are_refused_before_anything_is_trained_or_written(tmp_path, sections, message):
    pruning = sections.get("pruning", {})
    if "granularity" in pruning:
        sections = {"pruning": pruning | {"target": None}}
    with pytest.raises(hfprune.HfpruneError, match=message) as raised:
        run_recipe(tmp_path / "run", **sections)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


# ---- removal --------------------------------------------------------------------------------------------------------

HEADS = {
    "granularity": ["head", "neuron"],
    "target": {"macs": 0.5},
    "round_to": 1,
    "schedule": {"kind": "constant", "steps": 2},
}


def test_a_removal_leaves_a_smaller_model_behind(tmp_path):
    folder = tmp_path / "run"
    report = run_recipe(folder, pruning=HEADS)
    assert report["pruned"]["macs"] == pytest.approx(0.5 * report["dense"]["macs"], rel=0.03)
    assert report["pruned"]["params"] < report["dense"]["params"]
    assert [step["measured"] for step in report["steps"]] == ["macs", "macs"]
    assert [step["target"] for step in report["steps"]] == pytest.approx([0.25, 0.5])
    groups = report["removed"]["groups"]
    assert {group["kind"] for group in groups.values()} == {"head", "neuron"}
    gone = sum(group["units"] - group["kept"] for group in groups.values())
    assert gone == report["steps"][-1]["units_gone"]
    assert (folder / "units.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "sparsity.png").exists()
    card = (folder / "README.md").read_text()
    assert "feed-forward neurons are gone" in card and "structured-pruning" in card and "units.png" in card
    assert "import hfprune\n" in card and "zeros" not in card.partition("## Before and after")[0]


def test_a_smaller_model_loads_in_transformers_and_goes_on(tmp_path):
    folder = tmp_path / "run"
    run_recipe(folder, pruning=HEADS)
    pixels = torch.randn(2, 1, 8, 8)
    one = hfprune.from_pretrained(folder)(pixels).logits
    assert torch.equal(one, AutoModelForImageClassification.from_pretrained(folder).eval()(pixels).logits)
    model = {"name": str(folder), "args": {}, "pretrained": True}
    less = HEADS | {"granularity": "neuron", "target": {"macs": 0.9}, "schedule": "one_shot"}
    again = run_recipe(tmp_path / "again", model=model, baseline=None, pruning=less)
    assert again["dense"]["params"] == json.loads((folder / "pruning_report.json").read_text())["pruned"]["params"]
    assert again["pruned"]["macs"] == pytest.approx(0.9 * again["dense"]["macs"], rel=0.03)
    assert hfprune.from_pretrained(tmp_path / "again")(pixels).logits.shape == (2, 10)


def test_a_module_of_ones_own_gets_smaller(tmp_path):
    model = {"name": "tests.training.setup:PlainNet", "pretrained": True, "args": {}}
    report = run_recipe(tmp_path / "run", model=model, pruning=HEADS | {"granularity": "channel", "target": 0.5})
    assert report["removed"]["groups"] == {"conv": {"kind": "channel", "units": 16, "kept": 8}}
    from tests.training.setup import PlainNet

    assert hfprune.from_pretrained(tmp_path / "run", PlainNet).conv.out_channels == 8


def test_resuming_an_interrupted_removal_ends_alike(tmp_path, monkeypatch):
    whole = run_recipe(tmp_path / "whole", pruning=HEADS)
    from hfprune import pipeline

    def failing(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "_write", failing)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(tmp_path / "run", pruning=HEADS)
    resumed = run_recipe(tmp_path / "run", pruning=HEADS, resume=True)
    assert resumed["pruned"]["metric"] == whole["pruned"]["metric"]
    assert resumed["removed"] == whole["removed"]
    # What was seen of the time is not the whole of it.
    assert whole["seconds"] > 0 and "seconds" not in resumed


def test_a_strategy_stands_in_report_and_card(tmp_path):
    folder = tmp_path / "run"
    strategy = {"kind": "ice", "trigger": {"relative": 0.5}, "freeze": 0.3}
    pruning = {"granularity": "neuron", "round_to": 1, "strategy": strategy, "recovery": {"distill": {"alpha": 0.3}}}
    report = run_recipe(folder, baseline={"epochs": 1}, pruning=pruning | {"schedule": "one_shot"})
    assert [step["block"] for step in report["steps"]] == ["timm_model.blocks.0"]
    assert report["strategy"]["steps"] == 1 and report["strategy"]["dense"] == report["dense"]["metric"]["accuracy"]
    assert report["strategy"]["settings"]["trigger"]["relative"] == 0.5
    card = (folder / "README.md").read_text()
    assert "| 1 blocks.0 |" in card and "ICE: " in card and "of 1 steps were fine-tuned" in card
    assert run_recipe(folder, resume=True, baseline={"epochs": 1}, pruning=pruning | {"schedule": "one_shot"}) == report


def test_a_folder_in_which_a_run_is_at_work_is_refused(tmp_path):
    folder = tmp_path / "run"
    with reserved(folder), pytest.raises(ConfigError, match="output.folder: another run is at work in"):
        run_recipe(folder)
    assert not list(folder.iterdir())
    run_recipe(folder)
