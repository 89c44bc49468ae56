"""Files of a repository on the Hub, or one clear line about why they could not be had."""

from __future__ import annotations

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

from hfprune.errors import NotReachable
from hfprune.registry import nearest

# The client's own errors are OSErrors; its transport's are not, and the transport's package has changed its name
# between versions, so its root is taken from where the client itself inherits it.
HUB_ERRORS: tuple[type[Exception], ...] = (OSError, HfHubHTTPError.__bases__[0])


def fetch(key: str, name: str, *, kind: str = "model", revision: str | None = None, patterns: list[str]) -> Path:
    """The folder in the local cache with a repository's files, downloaded where they are not there yet.

    Without a connection the cache answers. The snapshot call asks the Hub once before it touches a file and does
    not retry that question, so that a machine without a connection has its answer at once.

    Args:
        key: the recipe's key that names the repository, for the error's line.
        name: the repository's id.
        kind: `model`, `dataset` or `space`.
        revision: a branch, tag or commit.
        patterns: glob patterns of the files wanted.

    Raises:
        NotReachable: one line with the key, the name, the cause and the way around.
    """
    try:
        return Path(snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=patterns))
    except (*HUB_ERRORS, HFValidationError) as error:
        raise not_reachable(key, name, error, revision) from None


def not_reachable(key: str, name: str, error: Exception, revision: str | None = None) -> NotReachable:
    """The line for an error that the Hub's client raised."""
    way = f"download it where there is a connection and give its folder: --set {key}=PATH"
    if isinstance(error, GatedRepoError):
        reason, way = "gated", "ask for access on its page and log in with `hf auth login`, or give a local folder"
    elif isinstance(error, RepositoryNotFoundError):
        reason, way = "no such repository, or a private one", f"mend the name or give a local folder: --set {key}=PATH"
    elif isinstance(error, RevisionNotFoundError):
        reason, way = f"it has no revision '{revision}'", "name one that its page lists"
    elif isinstance(error, HFValidationError):
        reason, way = "not a valid id", f"an id is OWNER/NAME; a local folder works too: --set {key}=PATH"
    elif is_offline_mode():
        reason = "offline mode is on"
    elif isinstance(error, LocalEntryNotFoundError) or not isinstance(error, HfHubHTTPError):
        reason = "no connection"
    else:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return NotReachable(f"{key}: '{name}' could not be reached on the Hub ({reason}); {way}")


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
