"""Files are whole or not there: a full disk, a failure or a read-only folder harm nothing."""

import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import hfprune
from hfprune import PruningConfig
from hfprune.checkpoint.files import side_folder, write_text
from hfprune.errors import CheckpointError
from tests.support.models import TINY

FULL_DISK = """
import resource, signal, sys
import torch, hfprune
from hfprune import PruningConfig
from hfprune.errors import CheckpointError
from tests.support.models import TINY

kind, folder = sys.argv[1:]
torch.manual_seed(0)
model = TINY[kind].build().eval()
hfprune.prune(model, PruningConfig(target=0.3))
hfprune.save_pretrained(model, folder)
hfprune.prune(model, PruningConfig(target=0.9))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
for place in (folder, folder + "/new"):
    try:
        hfprune.save_pretrained(model, place)
    except CheckpointError as error:
        print(str(error).count(chr(10)), error)
    else:
        print("no error")
"""


def contents(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


@pytest.mark.parametrize("kind", ["cnn", "vit", "timm_resnet"])
def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, kind):
    folder = tmp_path / "good"
    hfprune.prune(model := TINY[kind].build().eval(), PruningConfig(target=0.3))
    hfprune.save_pretrained(model, folder)
    before = contents(folder)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, kind, str(folder)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"0 could not write to '{folder}': ")
    assert lines[0].endswith("; what was there is unchanged")
    assert lines[1].startswith(f"0 could not write to '{folder}/new': ")
    assert contents(folder) == before
    assert {path.name for path in folder.iterdir()} == set(before)
    assert hfprune.verify(folder).ok


def test_nothing_changes_before_the_end(tmp_path):
    (tmp_path / "config.json").write_text("old")
    with side_folder(tmp_path) as side:
        (side / "config.json").write_text("new")
        assert (tmp_path / "config.json").read_text() == "old"
    assert (tmp_path / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_other_failures_pass_and_leave_nothing(tmp_path, error):
    (tmp_path / "config.json").write_text("old")
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(type(error)), side_folder(folder) as side:
            (side / "config.json").write_text("new")
            raise error
    assert (tmp_path / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_what_is_replaced_goes_with_the_new(tmp_path):
    for name in ("model-1.safetensors", "model.safetensors", "other.safetensors"):
        (tmp_path / name).write_text("old")
    with pytest.raises(CheckpointError), side_folder(tmp_path, replaces=("model*.safetensors",)):
        raise OSError("full")
    assert len(list(tmp_path.iterdir())) == 3
    with side_folder(tmp_path, replaces=("model*.safetensors",)) as side:
        (side / "model.safetensors").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "other.safetensors"]
    assert (tmp_path / "model.safetensors").read_text() == "new"


def test_a_folder_below_a_file(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(CheckpointError, match=f"^can't write to '{tmp_path}/x/y': "), side_folder(tmp_path / "x" / "y"):
        pass


def test_text_is_old_or_new(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "old")
    write_text(path, "ünï")
    assert path.read_text(encoding="utf-8") == "ünï"
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text(encoding="utf-8") == "ünï"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("name", ["mlp", "vit", "timm_vit"])
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_have_the_mode_that_the_umask_says(tmp_path, name, umask):
    before = os.umask(umask)
    try:
        hfprune.save_pretrained(TINY[name].build(), tmp_path / "model")
        write_text(tmp_path / "model" / "note.txt", "x")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert set(modes) >= {"model.safetensors", "config.json", "note.txt"}
    assert set(modes.values()) == {0o666 & ~umask}
