"""Training: PruningTrainer, its phases and what keeps them right."""

from hfprune.training.trainer import PruningTrainer

__all__ = ["PruningTrainer"]
