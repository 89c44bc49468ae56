#!/usr/bin/env bash
# Installs the project into .venv and runs its first recipe: a vision transformer on real digits, pruned to 80 %.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
accelerate launch scripts/prune.py --recipe recipes/vit_hybrid.yaml "$@"
