"""from_pretrained, verify and card on a repository: what is checked before anything is loaded."""

from __future__ import annotations

import json
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import hfprune
from hfprune import PruningConfig
from hfprune.cli import app
from hfprune.errors import CheckpointError, ConfigError, NotReachable
from tests.support.hub import TOKEN
from tests.support.models import MLP, llama, logits, vectors

REPO = "user/model"


def pushed(folder: Path, ratio: float = 0.5, **options) -> torch.nn.Module:
    model = MLP()
    hfprune.prune(model, PruningConfig(target=ratio))
    hfprune.save_pretrained(model, folder)
    hfprune.push_to_hub(folder, REPO, **options)
    return model


def command(*arguments: object) -> tuple[int, str]:
    """Exit code and all that was printed."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.output


def test_an_own_module_by_branch_tag_and_commit(hub, tmp_path):
    first = pushed(tmp_path / "one", 0.5, tag="ratio-0.5")
    sha = hub.storage.commit_of(REPO, "main")
    second = pushed(tmp_path / "two", 0.75)
    for revision, model in ((None, second), ("main", second), ("ratio-0.5", first), (sha, first)):
        again = hfprune.from_pretrained(REPO, MLP, revision=revision)
        assert torch.equal(logits(again, vectors()), logits(model, vectors()))
    assert hfprune.verify(REPO, "ratio-0.5").ok
    assert not hub.requests("GET", r"\.gitattributes$")


def test_the_cache_answers_where_the_hub_does_not(hub, tmp_path, monkeypatch):
    model = pushed(tmp_path / "m")
    hfprune.from_pretrained(REPO, MLP)
    hub.faults.add("GET", "/api/", status=500, times=10**6)
    again = hfprune.from_pretrained(REPO, MLP)
    assert torch.equal(logits(again, vectors()), logits(model, vectors()))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hfprune.from_pretrained(REPO, MLP)
    with pytest.raises(NotReachable, match="'user/other' could not be reached on the Hub .offline mode is on"):
        hfprune.from_pretrained("user/other", MLP)


def test_a_download_that_breaks_off_goes_on_where_it_was(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    model = llama()
    hfprune.prune(model, PruningConfig(target=0.5))
    hfprune.save_pretrained(model, tmp_path / "m")
    hfprune.push_to_hub(tmp_path / "m", REPO)
    hub.faults.add("GET", "model.safetensors$", after=9000)
    again = hfprune.from_pretrained(REPO)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert [line.status for line in hub.requests("GET", "model.safetensors$")] == [200, 206]


@contextmanager
def a_full_disk(size: int):
    """No file can become longer than so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_is_said_and_a_second_call_finishes(hub, tmp_path):
    model = llama()
    hfprune.save_pretrained(model, tmp_path / "m")
    hfprune.push_to_hub(tmp_path / "m", REPO)
    with a_full_disk(12_000), pytest.raises(NotReachable, match="could not be written: File too large"):
        hfprune.from_pretrained(REPO)
    again = hfprune.from_pretrained(REPO)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_what_is_not_there_is_one_line(hub, tmp_path, monkeypatch):
    pushed(tmp_path / "m", private=True)
    for call, said in (
        (lambda: hfprune.from_pretrained("user/none", MLP), "no such repository, or a private one"),
        (lambda: hfprune.from_pretrained(REPO, MLP, revision="v9"), "it has no revision 'v9'"),
        (lambda: hfprune.verify("us er/x"), "not a valid id"),
    ):
        with pytest.raises(NotReachable, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="is a folder here, which has no revision 'v1'"):
        hfprune.from_pretrained(tmp_path / "m", MLP, revision="v1")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "w" * 34)
    with pytest.raises(NotReachable, match="the token is not valid"):
        hfprune.from_pretrained(REPO, MLP)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(NotReachable, match="no such repository, or a private one"):
        hfprune.from_pretrained(REPO, MLP)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"config.json": None}, "holds no config.json"),
        ({"config.json": b"[]"}, "it holds no map"),
        ({"config.json": b'{"hfprune": {"format_version": 999}}'}, "written in format 999"),
        ({"model.safetensors": None}, "'model.safetensors' is missing"),
        ({"model.safetensors": b"\0" * 50}, "damaged"),
    ],
)
def test_a_repository_that_is_no_checkpoint_loads_nothing(hub, tmp_path, changes, said):
    pushed(tmp_path / "m")
    hub.storage.commit(REPO, "main", "by hand", changes)
    fresh = MLP()
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(CheckpointError, match=said):
        hfprune.from_pretrained(REPO, fresh)
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())
    code, shown = command("verify", REPO)
    assert code == 2 and shown.startswith("error: ") and shown.count("\n") == 1


def test_nothing_of_a_repository_is_run(hub, tmp_path):
    """Neither a modeling file, nor the function that its recipe names, nor a metric of its own."""
    pushed(tmp_path / "m")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n".encode()
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Model"}
    recipe = {
        "model": {"name": "evil:make"},
        "data": {"name": "digits"},
        "pruning": {"target": 0.5},
        "output": {"folder": "x"},
    }
    report = {"main_metric": "accuracy", "pruned": {"metric": {"accuracy": 0.5}}}
    files = {"evil.py": code, "config.json": json.dumps(config).encode(), "recipe.yaml": yaml.dump(recipe).encode()}
    hub.storage.commit(REPO, "main", "evil", files | {"pruning_report.json": json.dumps(report).encode()})
    hfprune.from_pretrained(REPO, MLP)
    exit_code, shown = command("verify", REPO)
    assert exit_code == 0 and "its model is made by code that it names, 'evil:make'; give --recipe FILE" in shown
    recipe |= {"model": {"name": "timm/resnet18"}, "data": {"name": "digits", "metrics": ["user/evil"]}}
    hub.storage.commit(REPO, "main", "evil", {"recipe.yaml": yaml.dump(recipe).encode()})
    exit_code, shown = command("verify", REPO)
    assert exit_code == 0 and "its metric 'user/evil' is code from elsewhere" in shown
    assert not (tmp_path / "ran").exists() and not hub.requests("GET", "evil")


@pytest.fixture
def digits_run(tmp_path):
    """A pruned timm model with a recipe and a report, whose metric is not what the model reaches."""
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2, num_classes=10
    )
    hfprune.prune(model, PruningConfig(target=0.5))
    hfprune.save_pretrained(model, tmp_path / "run")
    recipe = {
        "model": {"name": "timm/vit_tiny_patch16_224"},
        "data": {"name": "digits"},
        "pruning": {"target": 0.5},
        "output": {"folder": "x"},
    }
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.dump(recipe))
    return tmp_path / "run"


def report(folder: Path, accuracy: float) -> None:
    values = {"main_metric": "accuracy", "seed": 3, "pruned": {"metric": {"accuracy": accuracy}}}
    (folder / "pruning_report.json").write_text(json.dumps(values))


def test_verify_measures_the_metric_again(hub, digits_run):
    report(digits_run, 0.9)
    hfprune.push_to_hub(digits_run, REPO)
    code, shown = command("verify", REPO)
    assert code == 2 and "match their records, 50.00% of" in shown
    assert f"error: '{REPO}' does not reach what its report says" in shown and "0.9 in the report" in shown
    measured = float(shown.partition("accuracy ")[2].partition(" ")[0])
    report(digits_run, measured)
    code, shown = command("verify", digits_run)
    assert code == 0 and f"accuracy {measured:.6g} measured now, {measured:.6g} in the report" in shown
    (digits_run / "recipe.yaml").unlink()
    assert "not measured again: there is no recipe.yaml" in command("verify", digits_run)[1]
    (digits_run / "pruning_report.json").unlink()
    assert "not measured again: there is no pruning_report.json" in command("verify", digits_run)[1]


def test_verify_finds_a_tensor_that_changed(hub, tmp_path):
    pushed(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    first = next(iter(json.loads((tmp_path / "m" / "config.json").read_text())["hfprune"]["sparsity"]))
    tensors[first][tensors[first] == 0] = 1.0
    save_file(tensors, path, metadata={"format": "pt"})
    hub.storage.commit(REPO, "main", "by hand", {"model.safetensors": path.read_bytes()})
    code, shown = command("verify", REPO)
    assert code == 2 and f"'{first}' has 0 zeros" in shown
    with pytest.raises(CheckpointError, match="does not match its metadata"):
        hfprune.from_pretrained(REPO, MLP)


def test_card_shows_what_the_metadata_says(hub, tmp_path, digits_run):
    hfprune.push_to_hub(digits_run, REPO, revision="dev")
    code, shown = command("card", REPO, "--revision", "dev")
    assert code == 0 and not hub.requests("GET", "safetensors$")
    for words in (
        "granularity    weight",
        "criterion      l1",
        "target         50 % gone",
        "blocks.0.mlp.fc1.weight",
        f'AutoModelForImageClassification.from_pretrained("{REPO}", revision="dev")',
        f'timm.create_model("hf-hub:{REPO}@dev", pretrained=True)',
    ):
        assert words in shown
    model = llama()
    smaller = PruningConfig(granularity=["head", "neuron"], target={"params": 0.8})
    hfprune.prune(model, smaller)
    hfprune.save_pretrained(model, tmp_path / "small", remote_code=True)
    code, shown = command("card", tmp_path / "small")
    assert code == 0 and "80 % of the parameters left" in shown and "removed from the structure:" in shown
    hfprune.save_pretrained(MLP(), tmp_path / "dense")
    assert command("card", tmp_path / "dense")[0] == 2
    assert "no pruning metadata" in command("card", tmp_path / "dense")[1]


def test_the_push_command_prints_size_arrivals_and_the_commit(hub, digits_run):
    code, shown = command("push", digits_run, REPO, "--private", "--revision", "dev", "--message", "Look")
    lines = shown.strip().splitlines()
    assert code == 0 and lines[0].startswith(f"{digits_run}: 3 files, ")
    assert "pruned with hfprune" in hub.storage.content(REPO, "README.md", "dev").decode()
    assert not (digits_run / "README.md").exists()
    assert lines[1] == "model.safetensors: arrived (1 of 1)"
    assert lines[-1] == f"{hub.url}/{REPO}/commit/{hub.storage.commit_of(REPO, 'dev')}"
    assert hub.storage.history(REPO, "dev")[0]["title"] == "Look" and hub.storage.read(REPO)["private"]
    code, shown = command("push", digits_run / "nothing", REPO)
    assert code == 2 and shown == f"error: '{digits_run / 'nothing'}' is no folder\n"
    assert TOKEN not in shown
