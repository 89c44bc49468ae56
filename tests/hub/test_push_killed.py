"""A push that is killed: the same command goes on, sends nothing twice, and leaves one whole commit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

import hfprune
from hfprune import PruningConfig
from tests.support.hub import TOKEN
from tests.support.models import llama
from tests.support.processes import ROOT

MOMENTS = {
    "while the repository is made": ("POST", "repos/create", 0),
    "right after it was made": ("POST", "repos/create", None),
    "in the middle of a file": ("PUT", "/lfs/", 4096),
    "after the last file": ("POST", "/commit/", 0),
    "in the middle of the commit": ("POST", "/commit/", 100),
    "after the commit, before its answer": ("POST", "/commit/", None),
    "before the tag": ("POST", "/tag/", 0),
}

# Imports once; then pushes to every repository that it is told, each time in a process of its own.
PUSHER = """
import os, sys
import hfprune
from hfprune.hub import push
for line in sys.stdin:
    number = os.fork()
    if not number:
        hfprune.push_to_hub(*line.split(), tag="v1")
        os._exit(0)
    print(number, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]), flush=True)
"""


@pytest.fixture
def pusher(hub, tmp_path):
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    settings |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PUSHER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | settings, **pipes) as process:
        yield process
        process.stdin.close()


def test_the_same_push_goes_on(hub, pusher, tmp_path):
    for number, (moment, (method, path, after)) in enumerate(MOMENTS.items()):
        model, folder = llama(), tmp_path / str(number)
        hfprune.prune(model, PruningConfig(target=0.3 + number / 20))
        hfprune.save_pretrained(model, folder, max_shard_size="8KB")
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        repo, running = f"user/model-{number}", []
        known = threading.Event()

        def kill(running=running, known=known):
            known.wait(60)
            os.kill(running[0], signal.SIGKILL)

        hub.faults.add(method, path, after=after, skip=int(path == "/lfs/"), then=kill)
        pusher.stdin.write(f"{folder} {repo}\n")
        pusher.stdin.flush()
        running.append(int(pusher.stdout.readline()))
        known.set()
        assert int(pusher.stdout.readline()) == -signal.SIGKILL, moment
        arrived = {line.path for line in hub.log if line.method == "PUT" and line.status == 200}
        hub.log.clear()
        hfprune.push_to_hub(folder, repo, tag="v1", wait=0)
        assert not arrived & {line.path for line in hub.log if line.method == "PUT"}, moment
        assert len(hub.storage.history(repo)) == 2, moment
        assert hub.storage.read(repo)["tags"] == {"v1": hub.storage.commit_of(repo, "main")}, moment
        for name, value in before.items():
            assert name == "README.md" or hub.storage.content(repo, name) == value, moment
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
