"""Checkpoints of a run: whole or not there, verified before older ones go, and taken up exactly where they stand."""
