"""Repositories on disk: objects by their SHA-256, commits, branches and tags as JSON."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

Files = dict[str, dict[str, Any]]
"""Path to what is known of a file: `oid` (git's), `sha256`, `size`, `lfs`."""


class NotThere(Exception):
    """Something asked for is not there; the text is what the Hub puts into X-Error-Code."""


class Storage:
    """All repositories and all large objects below one folder."""

    def __init__(self, root: Path):
        self.root = root
        (root / "objects").mkdir(parents=True, exist_ok=True)

    # ---- objects ----------------------------------------------------------------------------------------------

    def object(self, sha256: str) -> Path:
        return self.root / "objects" / sha256

    def put(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        self.object(sha256).write_bytes(content)
        return sha256

    # ---- repositories -----------------------------------------------------------------------------------------

    def create(self, repo: str, private: bool) -> bool:
        """Whether it was made; it has one commit, as on the Hub."""
        if self._path(repo).is_file():
            return False
        self._path(repo).parent.mkdir(parents=True, exist_ok=True)
        state = {"private": private, "branches": {}, "tags": {}, "commits": {}}
        attributes = b"*.safetensors filter=lfs\n*.png filter=lfs\n"
        files = {".gitattributes": self._file(self.put(attributes), attributes, lfs=False)}
        self._add(state, "main", files, "initial commit")
        self._write(repo, state)
        return True

    def read(self, repo: str) -> dict[str, Any]:
        try:
            return json.loads(self._path(repo).read_text())
        except FileNotFoundError:
            raise NotThere("RepoNotFound") from None

    def commit_of(self, repo: str, revision: str) -> str:
        state = self.read(repo)
        found = state["branches"].get(revision) or state["tags"].get(revision)
        found = found or (revision if revision in state["commits"] else None)
        if found is None:
            raise NotThere("RevisionNotFound")
        return found

    def files(self, repo: str, revision: str) -> Files:
        return self.read(repo)["commits"][self.commit_of(repo, revision)]["files"]

    def history(self, repo: str, revision: str = "main") -> list[dict[str, Any]]:
        """The commits of a branch, the latest first."""
        state, found = self.read(repo), []
        sha = self.commit_of(repo, revision)
        while sha is not None:
            found.append(state["commits"][sha])
            sha = found[-1]["parent"]
        return found

    def content(self, repo: str, path: str, revision: str = "main") -> bytes:
        return self.object(self.files(repo, revision)[path]["sha256"]).read_bytes()

    def commit(self, repo: str, branch: str, title: str, changes: dict[str, Any]) -> str:
        """Puts changes on top of a branch: path to bytes, to a large object's SHA-256, or to None where it goes."""
        state = self.read(repo)
        if branch not in state["branches"]:
            raise NotThere("RevisionNotFound")
        files = dict(state["commits"][state["branches"][branch]]["files"])
        for path, change in changes.items():
            if change is None:
                if files.pop(path, None) is None:
                    raise NotThere("EntryNotFound")
            elif isinstance(change, bytes):
                files[path] = self._file(self.put(change), change, lfs=False)
            else:
                files[path] = self._file(change, self.object(change).read_bytes(), lfs=True)
        sha = self._add(state, branch, files, title)
        self._write(repo, state)
        return sha

    def point(self, repo: str, kind: str, name: str, sha: str | None) -> bool:
        """Makes a branch or tag, or removes it; False where it is there already."""
        state = self.read(repo)
        refs = state[kind]
        if sha is None:
            refs.pop(name, None)
        elif name in refs:
            return False
        else:
            refs[name] = sha
        self._write(repo, state)
        return True

    def set_private(self, repo: str, private: bool) -> None:
        self._write(repo, self.read(repo) | {"private": private})

    def _path(self, repo: str) -> Path:
        return self.root / "repos" / f"{repo}.json"

    def _write(self, repo: str, state: dict[str, Any]) -> None:
        self._path(repo).write_text(json.dumps(state))

    def _add(self, state: dict[str, Any], branch: str, files: Files, title: str) -> str:
        parent = state["branches"].get(branch)
        entry = {"parent": parent, "title": title, "files": files}
        sha = hashlib.sha1(json.dumps(entry, sort_keys=True).encode()).hexdigest()
        state["commits"][sha] = entry
        state["branches"][branch] = sha
        return sha

    def _file(self, sha256: str, content: bytes, lfs: bool) -> dict[str, Any]:
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"oid": git, "sha256": sha256, "size": len(content), "lfs": lfs}
