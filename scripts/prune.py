"""Runs a recipe.

accelerate launch scripts/prune.py --recipe recipes/vit_hybrid.yaml [--set pruning.target.ratio=.7] [--resume]
"""

import typer

from hfprune.cli import prune

if __name__ == "__main__":
    typer.run(prune)
