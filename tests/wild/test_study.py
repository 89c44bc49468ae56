"""A study: from no recording at all to a report; what is complete is taken up again, and nothing else is."""

import io
import json
import os

import pytest
from rich.console import Console
from typer.testing import CliRunner

from hfprune.cli import app
from hfprune.errors import CheckpointError, ConfigError
from hfprune.recipe import Recipe
from hfprune.scratch_speech import small_wav2vec2
from hfprune.speech.corpus import training_set
from hfprune.study import Study
from hfprune.wild.made import write_recordings
from hfprune.wild.store import Store
from hfprune.wild.study import run_study

VALUES = {
    "model": {
        "name": "hfprune.scratch_speech:small_wav2vec2",
        "args": {
            **{"hidden_size": 16, "intermediate_size": 24, "layers": 1, "heads": 2, "channels": 8},
            **{"kernels": [40, 8, 4], "strides": [20, 4, 4], "activation": "relu"},
        },
    },
    "data": {"name": "made", "task": "speech-recognition"},
    "baseline": {"max_steps": 2},
    "pruning": {"recovery": {"steps": 1}},
    "training": {"per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True},
    "wild": {
        **{"languages": ["en", "es"], "train": 4, "held_out": 2, "test": 1, "long": 1, "long_seconds": 2.0},
        "conditions": {"noise": [0.0], "voice": ["new"]},
        "ratios": [0.5],
    },
}


def study(folder, **wild):
    values = VALUES | {"wild": VALUES["wild"] | wild, "output": {"folder": str(folder), "batch_sizes": [1]}}
    values["pruning"] = VALUES["pruning"] | {"target": {"ratio": 0.5}}
    return Recipe.parse(values)


def go(recipe):
    said = io.StringIO()
    found = run_study(recipe, Console(file=said, width=140))
    return found, said.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A study that is interrupted once the dense model is there, and then goes on."""
    folder = tmp_path_factory.mktemp("study") / "whole"

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("hfprune.wild.study.run_recipe", interrupted)
        go(study(folder))
    weights = (folder / "dense" / "model.safetensors").stat().st_mtime_ns
    found, said = go(study(folder))
    assert (folder / "dense" / "model.safetensors").stat().st_mtime_ns == weights
    return folder, found, said


def test_from_nothing_to_a_report(made):
    folder, found, said = made
    with Store(folder / "wild.sqlite", make=False) as store:
        items, results = store.items(), store.results()
    assert {item["category"] for item in items} == {"clean", "noise", "voice", "long"} and len(items) == 8
    assert {item["conditions"]["condition"] for item in items} == {"clean", "noise 0 dB", "voice new", "long"}
    assert {item["status"] for item in items} == {"ok"} and {item["language"] for item in items} == {"en", "es"}
    assert [row["model"] for row in results[:2]] == ["dense", "pruned-0.5"] and len(results) == 16
    assert {row["status"] for row in results} == {"ok"}
    assert (folder / "wild_report.html").is_file() and len(found.data["models"]) == 2
    report = json.loads((folder / "pruned-0.5" / "pruning_report.json").read_text())
    assert report["pruned"]["nonzero"] < report["dense"]["nonzero"]
    assert "In the wild" in (folder / "pruned-0.5" / "README.md").read_text()
    assert "dense: wer" not in said and "this call took" in said


def test_the_same_call_makes_only_what_is_missing(made):
    folder, *_ = made
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix in (".wav", ".safetensors")}
    (folder / "speech" / ".wild-making").mkdir()
    found, said = go(study(folder, ratios=[0.5, 0.25]))
    assert "dense: wer" not in said and len(found.data["models"]) == 3
    assert {path: path.stat().st_mtime_ns for path in written} == written
    with Store(folder / "wild.sqlite", make=False) as store:
        assert [row["model"] for row in store.results()[16:]] == ["pruned-0.25"] * 8


def test_another_study_in_the_same_folder_is_refused(made):
    folder, *_ = made
    with pytest.raises(ConfigError, match=r"wild.test: 2 now, but the study in .* was begun with 1"):
        run_study(study(folder, test=2))
    recipe = study(folder)
    with pytest.raises(ConfigError, match=r"training.learning_rate: 0.1 now"):
        run_study(recipe.model_copy(update={"training": recipe.training | {"learning_rate": 0.1}}))


def test_recordings_are_there_whole_or_not_at_all(tmp_path, monkeypatch):
    few = Study(train=3, held_out=1)

    def interrupted():
        yield next(training_set(few))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_recordings(tmp_path / "train", interrupted(), 4, lambda *_: None)
    assert not list(tmp_path.iterdir())
    told = []
    write_recordings(tmp_path / "train", training_set(few), 4, lambda *words: told.append(words))
    assert len(list((tmp_path / "train").glob("*.wav"))) == 4 and told[-1] == ("making speech: train", 3, 4)
    rows = [json.loads(line) for line in (tmp_path / "train" / "metadata.jsonl").read_text().splitlines()]
    assert [row["split"] for row in rows] == ["train"] * 3 + ["test"]

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("hfprune.wild.made.write_audio", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_recordings(tmp_path / "other", training_set(few), 4, lambda *_: None)
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob(".*"))


def test_what_is_no_study_is_one_line(tmp_path, monkeypatch):
    recipe = study(tmp_path / "a")
    wrong = {
        "data.task": {"data": recipe.data.model_copy(update={"task": "causal-lm"})},
        "baseline: missing": {"baseline": None},
        "wild: missing": {"wild": None},
    }
    for line, update in wrong.items():
        with pytest.raises(ConfigError, match=line):
            run_study(recipe.model_copy(update=update))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="output.folder: can't write"):
        run_study(study(tmp_path / "file"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="runs in one process"):
        run_study(recipe)
    assert not (tmp_path / "a").exists()


def test_the_command(tmp_path):
    (tmp_path / "r.yaml").write_text(study(tmp_path / "a").model_copy(update={"wild": None}).to_yaml())
    answer = CliRunner().invoke(app, ["wild", "study", str(tmp_path / "r.yaml")])
    assert answer.exit_code == 2 and "wild: missing in" in answer.output
    answer = CliRunner().invoke(app, ["wild", "study", "recipes/wild_local.yaml", "--set", "wild.ratios=[2]"])
    assert answer.exit_code == 2 and "error: wild.ratios.0: " in answer.output


def test_as_many_strides_as_kernels():
    with pytest.raises(ConfigError, match=r"model.args.strides: 5 kernels need as many strides, not 1"):
        small_wav2vec2(strides=[20])
