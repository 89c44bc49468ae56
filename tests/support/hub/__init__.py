"""A Hub on this machine for tests: the protocol that huggingface_hub's own client speaks, with faults on demand."""

from tests.support.hub.server import TOKEN, Hub

__all__ = ["TOKEN", "Hub"]
