"""push_to_hub(): a checkpoint folder as one commit on the Hub, through connections that break."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from huggingface_hub import (
    CommitInfo,
    CommitOperation,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
)
from huggingface_hub.constants import DEFAULT_REVISION, is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hfprune.checkpoint.metadata import read_block
from hfprune.errors import CheckpointError, ConfigError, NotReachable
from hfprune.hub.card import card_of
from hfprune.hub.contents import WEIGHTS, card_for, contents, matches, stale
from hfprune.hub.reach import DISK_ERRORS, HUB_ERRORS, first_line, status_of
from hfprune.profiling import human_bytes

T = TypeVar("T")
Tell = Callable[[str], None]

TRIES = 4
WAIT = 2.0
"""Seconds before the second try; doubled before each further one. The client itself tries single requests again."""

# What may be over in a moment: time-outs, too many requests, trouble on the server's side.
_PASSING = (408, 425, 429, 500, 502, 503, 504)


def push_to_hub(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    tag: str | None = None,
    token: str | None = None,
    beside: dict[str, Path] | None = None,
    tries: int = TRIES,
    wait: float = WAIT,
    tell: Tell | None = None,
) -> CommitInfo:
    """Pushes a checkpoint folder: weights, config, card, report, recipe and pictures in one commit.

    The folder is checked first. Weights are uploaded one by one; what has arrived is not sent again, by this call or by
    the next. Weights, pictures and reports of an earlier push that have no successor are deleted by the same commit.

    Args:
        folder: a whole checkpoint, as `save_pretrained` or a run leaves it.
        repo: `OWNER/NAME`, or `NAME` for one's own; made where it is missing.
        private: whether the repository is private when it is made; by default as the owner's settings say.
        revision: the branch, made where it is missing; by default `main`.
        message: of the commit.
        tag: put on the commit; one of that name is moved.
        token: by default that of `hf auth login` or HF_TOKEN. It is sent to the Hub and written nowhere.
        beside: more files, by their path in the repository.
        tries: how often what fails is tried before this gives up.
        wait: seconds before the second try, doubled before each further one.
        tell: given a line on every step.

    Returns:
        What huggingface_hub says of the commit: `commit_url`, `oid`. Where nothing has changed it is the last one.

    Raises:
        ConfigError: the repository's id is not valid, or it is public and was to be private.
        CheckpointError: the folder is no whole checkpoint or holds a token.
        NotReachable: the Hub could not be reached or refused; the line says what arrived and what is missing.
    """
    check_id(repo)
    files = contents(folder)
    files |= beside or {}
    push = _Push(repo, revision or DEFAULT_REVISION, files, token, tries, wait, tell or (lambda line: None))
    push.tell(f"{folder}: {len(files)} files, {human_bytes(sum(path.stat().st_size for path in files.values()))}")
    push.repo = push.attempt("opening the repository", lambda: _opened(push.api, repo, private, push.branch))
    card = _card(Path(folder), files, push.repo)
    if card is not None:
        push.additions["README.md"] = CommitOperationAdd("README.md", card.encode(errors="surrogateescape"))
    push.upload()
    return push.commit(message or "Upload a pruned model", tag)


def _card(folder: Path, files: dict[str, Path], repo: str) -> str | None:
    """The card as it goes into the repository; the folder's own stays as it is."""
    if "README.md" not in files:
        return None if read_block(folder) is None else card_of(folder, repo=repo)
    return card_for(files["README.md"].read_bytes().decode(errors="surrogateescape"), folder, repo)


def open_repo(repo: str, private: bool | None = None, revision: str | None = None, token: str | None = None) -> str:
    """Makes a repository and a branch where they are missing, so that a long run fails before it begins.

    Returns:
        The repository's whole id.

    Raises:
        ConfigError, NotReachable: as `push_to_hub`.
    """
    check_id(repo)
    branch = revision or DEFAULT_REVISION
    push = _Push(repo, branch, {}, token, TRIES, WAIT, lambda line: None)
    return push.attempt("opening the repository", lambda: _opened(push.api, repo, private, branch))


def check_id(repo: str) -> None:
    """Refuses what can't be the id of a repository, with a ConfigError."""
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise ConfigError(
            f"'{repo}' is not a valid repository: use OWNER/NAME of letters, digits, '-', '_' and '.'"
        ) from None


@dataclass
class _Push:
    """One push: where to, what, and how far it has come."""

    repo: str
    branch: str
    files: dict[str, Path]
    token: str | None
    tries: int
    wait: float
    tell: Tell
    begun: bool = False
    committed: bool = False
    arrived: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if is_offline_mode():
            raise NotReachable(f"'{self.repo}' can't be pushed: offline mode is on; unset HF_HUB_OFFLINE")
        if not (self.token or get_token()):
            raise NotReachable(
                f"'{self.repo}' can't be pushed without a token; log in with `hf auth login`, or set HF_TOKEN"
            )
        self.api = HfApi(token=self.token, library_name="hfprune")
        self.weights = [name for name in self.files if matches(name, WEIGHTS)]
        self.additions = {name: CommitOperationAdd(name, str(path)) for name, path in self.files.items()}

    def upload(self) -> None:
        """Sends the weights, one file after another."""
        self.begun = True
        for name in self.weights:
            self.attempt(
                f"uploading {name}",
                lambda name=name: self.api.preupload_lfs_files(
                    self.repo, [self.additions[name]], revision=self.branch, free_memory=False
                ),
            )
            self.arrived.append(name)
            self.tell(f"{name}: arrived ({len(self.arrived)} of {len(self.weights)})")

    def commit(self, message: str, tag: str | None) -> CommitInfo:
        """Everything as one commit, and its tag."""
        info = self.attempt("committing", lambda: self._committed(message))
        self.committed = True
        if tag is not None:
            self.attempt(f"tagging {tag}, while the commit {info.commit_url} is there,", lambda: self._tag(tag, info))
        return info

    def _committed(self, message: str) -> CommitInfo:
        """Whatever a try before this one did counts: a commit whose answer was lost is found, and not made again."""
        there = self.api.list_repo_tree(self.repo, revision=self.branch)
        gone = stale([entry.path for entry in there], self.files)
        if gone:
            self.tell(f"deleting what an earlier push left: {', '.join(gone)}")
        additions, self.additions = self.additions, {n: _anew(one) for n, one in self.additions.items()}
        operations: list[CommitOperation] = [*additions.values(), *map(CommitOperationDelete, gone)]
        return self.api.create_commit(self.repo, operations, commit_message=message, revision=self.branch)

    def _tag(self, tag: str, info: CommitInfo) -> None:
        refs = {ref.name: ref.target_commit for ref in self.api.list_repo_refs(self.repo).tags}
        if refs.get(tag) == info.oid:
            return
        if tag in refs:
            self.api.delete_tag(self.repo, tag=tag)
        self.api.create_tag(self.repo, tag=tag, revision=info.oid)

    def attempt(self, doing: str, call: Callable[[], T]) -> T:
        """What a call gives; tried again while what goes wrong may pass.

        Raises:
            NotReachable: one line with the cause, what arrived and what is missing.
            CheckpointError: the Hub does not take the card, or a file of the folder can't be read.
        """
        pause = self.wait
        for number in range(1, self.tries + 1):
            try:
                return call()
            except (*HUB_ERRORS, RuntimeError, ValueError) as error:
                # The client wraps what went wrong with one of several uploads.
                cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
                if number == self.tries or not _may_pass(cause):
                    raise self._failure(doing, cause) from error
                self.tell(f"{doing} failed ({_reason(cause)}); trying again in {pause:g} s")
            time.sleep(pause)
            pause *= 2
        raise AssertionError("tries is at least 1")

    def _failure(self, doing: str, error: BaseException) -> Exception:
        status = status_of(error)
        if isinstance(error, ConfigError):
            return error
        if status is None and isinstance(error, OSError) and (error.errno in DISK_ERRORS or error.filename):
            return CheckpointError(f"{doing}: {first_line(error)}")
        if isinstance(error, ValueError) and status is None:
            return CheckpointError(f"{doing} in '{self.repo}': the Hub does not take it: {first_line(error)}")
        way = {401: "log in with `hf auth login`, or mend HF_TOKEN", 403: "the token may not write there"}.get(status)
        return NotReachable(
            f"{doing} in '{self.repo}' failed ({_reason(error)}){self._progress()}; "
            f"{way or 'the same command goes on from there'}"
        )

    def _progress(self) -> str:
        missing = [name for name in self.weights if name not in self.arrived]
        if self.committed:
            return ""
        if not self.begun:
            return ": nothing was sent"
        if not missing:
            return ": all weights arrived, but not the commit with them and the other files"
        sizes = [
            human_bytes(sum(self.files[n].stat().st_size for n in names)) for names in (self.arrived, self.weights)
        ]
        return (
            f": {len(self.arrived)} of {len(self.weights)} weight files arrived ({sizes[0]} of {sizes[1]}), "
            f"missing {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )


def _opened(api: HfApi, repo: str, private: bool | None, branch: str) -> str:
    whole = api.create_repo(repo, private=private, exist_ok=True).repo_id
    if private and not api.repo_info(whole).private:
        raise ConfigError(f"'{whole}' is there already and public; make it private on its page, or push elsewhere")
    if branch != DEFAULT_REVISION and not branch.startswith("refs/"):
        api.create_branch(whole, branch=branch, exist_ok=True)
    return whole


def _anew(addition: CommitOperationAdd) -> CommitOperationAdd:
    """The same file for another commit; its hash is kept."""
    fresh = CommitOperationAdd(addition.path_in_repo, addition.path_or_fileobj)
    fresh.upload_info = addition.upload_info
    return fresh


def _may_pass(error: BaseException) -> bool:
    """Whether trying again can help: the connection broke, or the server had trouble."""
    status = status_of(error)
    if status is not None:
        return status in _PASSING
    if isinstance(error, OSError):
        return isinstance(error, ConnectionError | TimeoutError)
    return isinstance(error, HUB_ERRORS)


def _reason(error: BaseException) -> str:
    status = status_of(error)
    if status == 401:
        return "the token is not valid"
    if status is None:
        return first_line(error)
    said = (getattr(error, "server_message", None) or "").strip().splitlines()
    return f"the Hub answered {status}{f': {said[0]}' if said else ''}"
