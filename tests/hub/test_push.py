"""push_to_hub(): huggingface_hub's own client against a real server that fails in every way."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import nn

import hfprune
from hfprune import PruningConfig
from hfprune.errors import CheckpointError, ConfigError, NotReachable
from hfprune.hub.push import open_repo
from tests.support.hub import TOKEN
from tests.support.models import MLP, llama

REPO = "user/model"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


@cache
def pruned() -> nn.Module:
    model = llama()
    hfprune.prune(model, PruningConfig(target=0.5))
    return model


def saved(folder: Path, **options) -> Path:
    """A pruned Llama, by default in three shards, with what a run leaves beside it."""
    hfprune.save_pretrained(pruned(), folder, **({"max_shard_size": "8KB"} | options))
    (folder / "README.md").write_text(
        f'---\nmodel_name: {folder.name}\n---\n# A model\n\nmodel = Auto.from_pretrained("{folder.name}")\n'
    )
    (folder / "pruning_report.json").write_text("{}\n")
    (folder / "sparsity.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for stays in ("training_args.json", "optimizer.pt", "pruning_state.json", ".hidden", "checkpoint-3/config.json"):
        (folder / stays).parent.mkdir(exist_ok=True)
        (folder / stays).write_text("{}")
    return folder


def push(folder: Path, repo: str = REPO, **options):
    return hfprune.push_to_hub(folder, repo, wait=0, **options)


def oid(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_all_goes_in_one_commit_and_what_is_ours_stays(hub, tmp_path):
    folder = saved(tmp_path / "llama")
    lines: list[str] = []
    commit = push(folder, message="The first", tell=lines.append)
    history = hub.storage.history(REPO)
    assert [entry["title"] for entry in history] == ["The first", "initial commit"]
    expected = {"config.json", "generation_config.json", "README.md", "pruning_report.json", "sparsity.png", *SHARDS}
    assert set(history[0]["files"]) - {".gitattributes"} == expected | {"model.safetensors.index.json"}
    assert commit.commit_url == f"{hub.url}/{REPO}/commit/{hub.storage.commit_of(REPO, 'main')}"
    assert lines[0].startswith(f"{folder}: 9 files, ") and lines[-1] == f"{SHARDS[2]}: arrived (3 of 3)"
    assert hub.storage.content(REPO, SHARDS[1]) == (folder / SHARDS[1]).read_bytes()
    card = hub.storage.content(REPO, "README.md").decode()
    assert f'from_pretrained("{REPO}")' in card and '"llama"' not in card
    assert 'from_pretrained("llama")' in (folder / "README.md").read_text()
    assert push(folder).oid == commit.oid and len(hub.storage.history(REPO)) == 2


def test_files_of_an_earlier_push_are_deleted_in_the_same_commit(hub, tmp_path):
    push(saved(tmp_path / "sharded"))
    hub.storage.commit(REPO, "main", "by hand", {"notes.txt": b"mine", "pytorch_model.bin": b"old"})
    whole = saved(tmp_path / "whole", max_shard_size="1GB")
    (whole / "sparsity.png").unlink()
    push(whole)
    files = set(hub.storage.files(REPO, "main"))
    assert files == {
        ".gitattributes", "notes.txt", "config.json", "generation_config.json", "README.md", "pruning_report.json",
        "model.safetensors",
    }  # fmt: skip
    assert len(hub.storage.history(REPO)) == 4


@pytest.mark.parametrize("times", [1, 8])
def test_a_connection_that_drops_in_mid_upload_is_taken_up_again(hub, tmp_path, times):
    """Once the client itself tries again; after its seven tries we do."""
    folder = saved(tmp_path / "m")
    second = oid(folder / SHARDS[1])
    hub.faults.add("PUT", second, after=4096, times=times)
    lines: list[str] = []
    push(folder, tell=lines.append)
    assert len(hub.storage.history(REPO)) == 2
    assert any("failed" in line for line in lines) == (times > 1)
    arrived = [line for line in hub.log if line.method == "PUT" and line.status == 200]
    assert sorted(line.path for line in arrived) == sorted({line.path for line in arrived})
    assert all(len(hub.requests("PUT", oid(folder / name))) == 1 for name in (SHARDS[0], SHARDS[2]))


def test_what_fails_for_good_says_what_is_missing_and_a_second_call_sends_only_that(hub, tmp_path):
    folder = saved(tmp_path / "m")
    hub.faults.add("PUT", oid(folder / SHARDS[1]), after=4096, times=10**6)
    with pytest.raises(NotReachable) as caught:
        push(folder, tries=2)
    line = str(caught.value)
    assert "1 of 3 weight files arrived" in line and f"missing {SHARDS[1]}, {SHARDS[2]}" in line
    assert "the same command goes on" in line and "\n" not in line
    assert len(hub.storage.history(REPO)) == 1
    hub.faults.clear()
    before = hub.uploaded()
    push(folder)
    rest = [folder / name for name in (*SHARDS[1:], "sparsity.png")]
    assert hub.uploaded() - before == sum(path.stat().st_size for path in rest)
    assert len(hub.storage.history(REPO)) == 2


@pytest.mark.parametrize(
    "method, path, how",
    [
        ("PUT", "/lfs/", {"status": 429, "headers": {"Retry-After": "0"}}),
        ("PUT", "/lfs/", {"status": 500}),
        ("POST", "objects/batch", {"status": 503}),
        ("POST", "preupload", {"after": 0}),
        ("POST", "repos/create", {"after": 0}),
        ("POST", "/commit/", {"status": 500}),
        ("POST", "/commit/", {"status": 429, "times": 3}),
        ("POST", "/commit/", {"after": 100}),
        ("POST", "/commit/", {"after": None}),
        ("GET", "/tree/", {"status": 502, "times": 7}),
    ],
)
def test_what_passes_leaves_one_whole_commit(hub, tmp_path, method, path, how):
    folder = saved(tmp_path / "m", max_shard_size="1GB")
    hub.faults.add(method, path, **how)
    push(folder, tag="v1")
    assert len(hub.storage.history(REPO)) == 2
    assert hub.storage.read(REPO)["tags"] == {"v1": hub.storage.commit_of(REPO, "main")}
    assert hub.uploaded() >= (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    "method, path, status, said",
    [
        ("PUT", "/lfs/", 507, "uploading model.safetensors in 'user/model' failed (the Hub answered 507"),
        ("POST", "/commit/", 413, "all weights arrived, but not the commit"),
        ("POST", "/commit/", 401, "log in with `hf auth login`"),
        ("POST", "repos/create", 403, "nothing was sent; the token may not write there"),
        ("POST", "/tag/", 403, "is there, in 'user/model' failed (the Hub answered 403: injected); the token may not"),
    ],
)
def test_a_refusal_is_not_tried_again_and_a_second_call_finishes(hub, tmp_path, method, path, status, said):
    folder = saved(tmp_path / "m", max_shard_size="1GB")
    open_repo(REPO)
    hub.faults.add(method, path, status=status)
    if path == "repos/create":
        # The client then asks whether the repository is there already.
        hub.faults.add("GET", f"/api/models/{REPO}$", status=status)
    with pytest.raises(NotReachable) as caught:
        push(folder, tag="v1")
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert len(hub.requests(method, path)) == 1 + (path == "repos/create")
    push(folder, tag="v1")
    assert len(hub.storage.history(REPO)) == 2 and hub.storage.read(REPO)["tags"]


def test_large_files_go_in_parts(hub, tmp_path):
    hub.part_size = 5000
    folder = saved(tmp_path / "m", max_shard_size="1GB")
    push(folder)
    assert hub.storage.content(REPO, "model.safetensors") == (folder / "model.safetensors").read_bytes()
    assert len(hub.requests("PUT", r"/lfs/\w+/\d+$")) > 2


def test_a_branch_a_private_repository_and_a_tag_that_moves(hub, tmp_path):
    folder = saved(tmp_path / "m", max_shard_size="1GB")
    push(folder, private=True, revision="dev", tag="ratio-0.5")
    state = hub.storage.read(REPO)
    assert state["private"] and len(hub.storage.history(REPO, "dev")) == 2 and len(hub.storage.history(REPO)) == 1
    (folder / "notes.txt").write_text("more")
    push(folder, revision="dev", tag="ratio-0.5")
    assert hub.storage.commit_of(REPO, "ratio-0.5") == hub.storage.commit_of(REPO, "dev") != state["tags"]["ratio-0.5"]
    hub.storage.set_private(REPO, False)
    with pytest.raises(ConfigError, match="public"):
        push(folder, private=True)


def damaged(folder: Path) -> None:
    """A zero that is none any more."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({name: value + 1 for name, value in tensors.items()}, path, metadata={"format": "pt"})


def newer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["hfprune"]["format_version"] = 999
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "'model.safetensors' is missing"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 40), "damaged"),
        (damaged, "does not match its metadata"),
        (newer, "written in format 999"),
        (lambda folder: (folder / "recipe.yaml").write_text(f"training: {{hub_token: {TOKEN}}}"), "an access token"),
    ],
)
def test_a_folder_that_is_no_whole_checkpoint_is_not_pushed(hub, tmp_path, spoil, said):
    folder = saved(tmp_path / "m", max_shard_size="1GB")
    spoil(folder)
    with pytest.raises(CheckpointError, match=said) as caught:
        push(folder)
    assert not hub.log and TOKEN not in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_ids_tokens_and_offline_mode_are_one_line(hub, tmp_path, monkeypatch):
    hfprune.save_pretrained(MLP(), tmp_path / "m")
    for repo in ("us er/x", "a/b/c", "-x/y", "x--y/z..", ""):
        with pytest.raises(ConfigError, match="not a valid repository"):
            push(tmp_path / "m", repo)
    with pytest.raises(NotReachable, match="the Hub answered 403: You have no rights in other"):
        push(tmp_path / "m", "other/x")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "w" * 34)
    with pytest.raises(NotReachable, match="the token is not valid") as caught:
        push(tmp_path / "m")
    assert "www" not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(NotReachable, match="without a token; log in with `hf auth login`"):
        push(tmp_path / "m")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NotReachable, match="offline mode is on"):
        push(tmp_path / "m")


def test_a_server_that_is_not_there_is_one_line(hub, tmp_path, monkeypatch):
    hfprune.save_pretrained(MLP(), tmp_path / "m")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NotReachable, match="nothing was sent; the same command goes on") as caught:
        push(tmp_path / "m", tries=2)
    assert "\n" not in str(caught.value)
