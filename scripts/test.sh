#!/usr/bin/env bash
# Makes the same environment as quickstart.sh and passes the tests; arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
ruff check .
ruff format --check .
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
pytest -n 2 --dist loadfile "$@"
