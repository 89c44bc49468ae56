"""ICE-Pruning: one block a step, fine-tuned only where it must be, with settings that a search on a sample finds."""
