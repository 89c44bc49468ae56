"""Files of a repository on the Hub, or one clear line about why they could not be had."""

from __future__ import annotations

import errno
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hfprune.errors import ConfigError, NotReachable
from hfprune.registry import nearest

# The client's own errors are OSErrors; its transport's are not, and the transport's package has changed its name
# between versions, so its root is taken from where the client itself inherits it.
HUB_ERRORS: tuple[type[Exception], ...] = (OSError, HfHubHTTPError.__bases__[0])
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)


CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "recipe.yaml"]
"""What is downloaded of a checkpoint: what loading and checking read; never code."""


def folder_of(name: str | Path, revision: str | None = None, patterns: list[str] | None = None) -> Path:
    """The folder that a name stands for: a folder on this machine, or a repository's snapshot in the local cache.

    Args:
        name: a path, or `OWNER/NAME` on the Hub, which is asked where there is no such folder.
        revision: a branch, tag or commit on the Hub.
        patterns: of the files wanted; by default CHECKPOINT_FILES. Those in sub-folders are left out.

    Raises:
        ConfigError: a revision of a folder on this machine.
        NotReachable: one line with the cause, where the repository could not be had.
    """
    text = str(name)
    if Path(text).exists() or "/" not in text or isinstance(name, Path) or looks_like_path(text):
        if revision is not None:
            raise ConfigError(f"revision: '{name}' is a folder here, which has no revision '{revision}'")
        return Path(text)
    return fetch(None, text, revision=revision, patterns=patterns or CHECKPOINT_FILES, ignored=["*/*"])


def fetch(
    key: str | None,
    name: str,
    *,
    kind: str = "model",
    revision: str | None = None,
    patterns: list[str],
    ignored: list[str] | None = None,
) -> Path:
    """The folder in the local cache with a repository's files, downloaded where they are not there yet.

    Without a connection the cache answers. The snapshot call asks the Hub once before it touches a file and does
    not retry that question, so that a machine without a connection has its answer at once.

    Args:
        key: the recipe's key that names the repository, for the error's line; None where no recipe does.
        name: the repository's id.
        kind: `model`, `dataset` or `space`.
        revision: a branch, tag or commit.
        patterns: glob patterns of the files wanted.
        ignored: glob patterns of files among them that are not.

    Raises:
        NotReachable: one line with the key, the name, the cause and the way around.
    """
    try:
        return Path(
            snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=patterns, ignore_patterns=ignored)
        )
    except (*HUB_ERRORS, HFValidationError) as error:
        raise not_reachable(key, name, error, revision) from None


def not_reachable(key: str | None, name: str, error: Exception, revision: str | None = None) -> NotReachable:
    """The line for an error that the Hub's client raised."""
    here = f": --set {key}=PATH" if key else ""
    way = f"download it where there is a connection and give its folder{here}"
    # What the client says where the cache can't answer either hides what the Hub answered.
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__
    if isinstance(error, GatedRepoError):
        reason, way = "gated", "ask for access on its page and log in with `hf auth login`, or give a local folder"
    elif isinstance(error, RepositoryNotFoundError):
        reason, way = "no such repository, or a private one", f"mend the name or give a local folder{here}"
    elif isinstance(error, RevisionNotFoundError):
        reason, way = f"it has no revision '{revision}'", "name one that its page lists"
    elif isinstance(error, HFValidationError):
        reason, way = "not a valid id", f"an id is OWNER/NAME; a local folder works too{here}"
    elif status_of(error) == 401:
        reason, way = "the token is not valid", "log in with `hf auth login`, or mend HF_TOKEN"
    elif is_offline_mode():
        reason = "offline mode is on"
    elif isinstance(error, OSError) and error.errno in DISK_ERRORS:
        reason, way = f"it could not be written: {error.strerror}", "make room, or set HF_HOME to another place"
    elif isinstance(error, LocalEntryNotFoundError) or not isinstance(error, HfHubHTTPError):
        reason = "no connection"
    else:
        reason = first_line(error)
    return NotReachable(f"{f'{key}: ' if key else ''}'{name}' could not be reached on the Hub ({reason}); {way}")


def status_of(error: BaseException) -> int | None:
    """The status that the Hub answered with, where an error is such an answer."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def looks_like_path(name: str) -> bool:
    """Whether a name can only mean something on this machine: `./x`, `/x`, `~/x`, a deep path, or beside an existing
    folder (`runs/vit` where `runs` is one)."""
    if name.startswith((".", "/", "~")) or "\\" in name or name.endswith("/") or name.count("/") > 1:
        return True
    return "/" in name and Path(name).parent.is_dir()


def missing_path(name: str) -> str:
    """An ending for an error about a path that is not there: the nearest one that is."""
    path = Path(name).expanduser()
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    match = nearest(path.name, [entry.name for entry in parent.iterdir()])
    return f"did you mean '{parent / match}'?" if match else f"'{parent}' has nothing like it"
