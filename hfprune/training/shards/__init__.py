"""Sharded models: masks on shards, removal between phases, and whole tensors where there must be some."""
