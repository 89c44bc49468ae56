"""The command line: `hfprune` and its commands."""

from hfprune.cli.commands import app, main, prune

__all__ = ["app", "main", "prune"]
