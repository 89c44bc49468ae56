"""The local Hub: an HTTP server that answers what huggingface_hub's client asks, from repositories on disk."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.support.hub.faults import Fault, Faults
from tests.support.hub.storage import NotThere, Storage

TOKEN = "hf_" + "t" * 34
LARGE = (".safetensors", ".png")
ID = r"(?P<repo>[\w.-]+/[\w.-]+)"
REV = r"(?P<rev>[^/]+)"


@dataclass
class Request:
    """What the server saw: one line of its log."""

    method: str
    path: str
    received: int
    status: int


class Hub:
    """A running server. `with Hub(folder) as hub:` gives `hub.url`; `hub.faults` and `hub.log` are for tests."""

    def __init__(self, root: Path, part_size: int | None = None):
        self.storage = Storage(root)
        self.faults = Faults()
        self.log: list[Request] = []
        self.part_size = part_size
        self.parts: dict[str, dict[int, bytes]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("_Bound", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def uploaded(self) -> int:
        """Bytes of large objects that arrived, those of broken uploads included."""
        return sum(line.received for line in self.log if line.method == "PUT")

    def requests(self, method: str, path: str) -> list[Request]:
        return [line for line in self.log if line.method == method and re.search(path, line.path)]


ROUTES: list[tuple[str, re.Pattern, str]] = []


def route(method: str, pattern: str) -> Callable:
    """Names the requests that a method of the handler answers."""

    def named(function: Callable) -> Callable:
        ROUTES.append((method, re.compile(pattern + r"$"), function.__name__))
        return function

    return named


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _serve(self) -> None:
        self.parsed = urlsplit(self.path)
        fault = self.hub.faults.meet(self.command, self.parsed.path)
        broken = fault is not None and fault.status is None
        self.received, self.status = 0, 0
        parts = []
        for part in self._body():
            self.received += len(part)
            parts.append(part)
            if broken and fault.after is not None and self.received >= fault.after:
                break
        if broken and fault.after is not None and self.command != "GET":
            self._log()
            self._break(fault)
            return
        self.most = (fault.after or 0) if broken else None
        if fault is not None and not broken:
            self._fail(fault)
        else:
            self._dispatch(b"".join(parts))
        self._log()
        if broken:
            self._break(fault)

    def _body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            part = self.rfile.read(min(left, 4096))
            if not part:
                return
            left -= len(part)
            yield part

    def _log(self) -> None:
        self.hub.log.append(Request(self.command, self.parsed.path, self.received, self.status))

    def _break(self, fault: Fault) -> None:
        if fault.then is not None:
            fault.then()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _fail(self, fault: Fault) -> None:
        self._answer(fault.status, {"error": "injected"}, fault.headers)

    def _dispatch(self, body: bytes) -> None:
        method = "GET" if self.command == "HEAD" else self.command
        for known, pattern, name in ROUTES:
            match = pattern.match(self.parsed.path)
            if known == method and match:
                named = {key: unquote(value) for key, value in match.groupdict().items() if value}
                try:
                    if self._allowed(named.get("repo")):
                        getattr(self, name)(body, **named)
                except NotThere as error:
                    self._answer(404, {"error": str(error)}, {"X-Error-Code": str(error)})
                return
        self._answer(404, {"error": f"no such route: {self.command} {self.path}"})

    def _allowed(self, repo: str | None) -> bool:
        """Refuses a wrong token, writing without one, and looking at what is private without one."""
        given = self.headers.get("Authorization")
        if given is not None and given != f"Bearer {TOKEN}":
            message = "Invalid credentials in Authorization header"
            self._answer(401, {"error": message}, {"X-Error-Message": message})
            return False
        writes = self.command in ("POST", "DELETE") and not self.parsed.path.startswith("/lfs/")
        if given is None and (writes or (repo and self.hub.storage.read(repo)["private"])):
            self._answer(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return False
        return True

    def _answer(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        self.status = status
        if self.most is not None and self.command != "GET":
            return
        self.send_response(status)
        headers = {"Content-Length": str(len(data)), "Content-Type": "application/json"} | (headers or {})
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: self.most])

    most: int | None = None

    # ---- repositories -----------------------------------------------------------------------------------------

    @route("GET", "/api/whoami-v2")
    def _whoami(self, body: bytes) -> None:
        self._answer(200, {"name": "user", "type": "user"})

    @route("POST", "/api/repos/create")
    def _create(self, body: bytes) -> None:
        values = json.loads(body)
        owner = values.get("organization") or "user"
        if owner != "user":
            self._answer(403, {"error": "no rights"}, {"X-Error-Message": f"You have no rights in {owner}"})
            return
        repo = f"{owner}/{values['name']}"
        private = values.get("visibility") == "private" or values.get("private") is True
        made = self.hub.storage.create(repo, private)
        self._answer(200 if made else 409, {"url": f"{self.hub.url}/{repo}", "id": repo, "name": repo})

    @route("GET", f"/api/models/{ID}")
    def _info(self, body: bytes, repo: str, rev: str = "main") -> None:
        storage = self.hub.storage
        files = [{"rfilename": name} for name in storage.files(repo, rev)]
        sha = storage.commit_of(repo, rev)
        private = storage.read(repo)["private"]
        self._answer(200, {"id": repo, "modelId": repo, "sha": sha, "private": private, "siblings": files, "tags": []})

    @route("GET", f"/api/models/{ID}/revision/{REV}")
    def _info_at(self, body: bytes, repo: str, rev: str) -> None:
        self._info(body, repo, rev)

    @route("GET", f"/api/models/{ID}/tree/{REV}(?P<below>/.*)?")
    def _tree(self, body: bytes, repo: str, rev: str, below: str = "") -> None:
        files = self.hub.storage.files(repo, rev)
        inside = below.strip("/")
        listed = [self._entry(path, facts) for path, facts in files.items() if path.startswith(inside)]
        if inside and not listed:
            raise NotThere("EntryNotFound")
        self._answer(200, listed)

    def _entry(self, path: str, facts: dict[str, Any]) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": facts["size"], "oid": facts["oid"]}
        if facts["lfs"]:
            entry["lfs"] = {"oid": facts["sha256"], "size": facts["size"], "pointerSize": 134}
        return entry

    @route("GET", f"/api/models/{ID}/refs")
    def _refs(self, body: bytes, repo: str) -> None:
        state = self.hub.storage.read(repo)
        found: dict[str, Any] = {"converts": []}
        for kind, prefix in (("branches", "heads"), ("tags", "tags")):
            found[kind] = [
                {"name": name, "ref": f"refs/{prefix}/{name}", "targetCommit": sha} for name, sha in state[kind].items()
            ]
        self._answer(200, found)

    @route("POST", f"/api/models/{ID}/branch/{REV}")
    def _branch(self, body: bytes, repo: str, rev: str) -> None:
        sha = self.hub.storage.commit_of(repo, json.loads(body).get("startingPoint") or "main")
        self._answer(200 if self.hub.storage.point(repo, "branches", rev, sha) else 409, {})

    @route("POST", f"/api/models/{ID}/tag/{REV}")
    def _tag(self, body: bytes, repo: str, rev: str) -> None:
        sha = self.hub.storage.commit_of(repo, rev)
        self._answer(200 if self.hub.storage.point(repo, "tags", json.loads(body)["tag"], sha) else 409, {})

    @route("DELETE", f"/api/models/{ID}/tag/{REV}")
    def _untag(self, body: bytes, repo: str, rev: str) -> None:
        self.hub.storage.point(repo, "tags", rev, None)
        self._answer(200, {})

    # ---- pushing ----------------------------------------------------------------------------------------------

    @route("POST", "/api/validate-yaml")
    def _validate(self, body: bytes) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    @route("POST", f"/api/models/{ID}/preupload/{REV}")
    def _preupload(self, body: bytes, repo: str, rev: str) -> None:
        there = self.hub.storage.files(repo, rev)
        answer = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            facts = there.get(file["path"])
            oid = None if facts is None else facts["sha256" if facts["lfs"] else "oid"]
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer(200, {"files": answer})

    @route("POST", rf"/{ID}\.git/info/lfs/objects/batch")
    def _batch(self, body: bytes, repo: str) -> None:
        self.hub.storage.read(repo)
        answer = []
        for wanted in json.loads(body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry = {"oid": oid, "size": size}
            if not self.hub.storage.object(oid).is_file():
                entry["actions"] = {"upload": self._upload(oid, size)}
            answer.append(entry)
        self._answer(200, {"transfer": "basic", "objects": answer})

    def _upload(self, oid: str, size: int) -> dict[str, Any]:
        target = f"{self.hub.url}/lfs/{oid}"
        if self.hub.part_size is None or size <= self.hub.part_size:
            return {"href": target, "header": {}}
        count = -(-size // self.hub.part_size)
        parts = {str(number): f"{target}/{number}" for number in range(1, count + 1)}
        return {"href": f"{target}/whole", "header": {"chunk_size": str(self.hub.part_size), **parts}}

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def _put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._answer(400, {"error": "the content does not match its hash"})
            return
        self.hub.storage.put(body)
        self._answer(200)

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})/(?P<number>[0-9]+)")
    def _put_part(self, body: bytes, oid: str, number: str) -> None:
        self.hub.parts.setdefault(oid, {})[int(number)] = body
        self._answer(200, headers={"ETag": hashlib.sha256(body).hexdigest()})

    @route("POST", "/lfs/(?P<oid>[0-9a-f]{64})/whole")
    def _complete(self, body: bytes, oid: str) -> None:
        parts = self.hub.parts.pop(oid)
        self._put(b"".join(parts[entry["partNumber"]] for entry in json.loads(body)["parts"]), oid)

    @route("POST", f"/api/models/{ID}/commit/{REV}")
    def _commit(self, body: bytes, repo: str, rev: str) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        changes: dict[str, Any] = {}
        title = ""
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if not self.hub.storage.object(value["oid"]).is_file():
                    self._answer(400, {"error": f"{value['path']} was never uploaded"})
                    return
                changes[value["path"]] = value["oid"]
            elif key == "deletedFile":
                changes[value["path"]] = None
        sha = self.hub.storage.commit(repo, rev, title, changes)
        self._answer(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    # ---- pulling ----------------------------------------------------------------------------------------------

    @route("GET", f"/{ID}/resolve/{REV}/(?P<path>.+)")
    def _resolve(self, body: bytes, repo: str, rev: str, path: str) -> None:
        sha = self.hub.storage.commit_of(repo, rev)
        facts = self.hub.storage.files(repo, sha).get(path)
        commit = {"X-Repo-Commit": sha}
        if facts is None:
            self._answer(404, {"error": "Entry not found"}, commit | {"X-Error-Code": "EntryNotFound"})
            return
        headers = commit | {"ETag": f'"{facts["sha256"] if facts["lfs"] else facts["oid"]}"', "Accept-Ranges": "bytes"}
        content = self.hub.storage.object(facts["sha256"]).read_bytes()
        begin = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if begin is None:
            self._answer(200, content, headers)
            return
        first, last = int(begin[1]), int(begin[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._answer(206, content[first : last + 1], headers)
