#!/usr/bin/env bash
# Makes the same environment as quickstart.sh and passes the tests; arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
# DeepSpeed lies apart: in the environment itself every process would import it.
if [ ! -d .venv/apart/deepspeed ]; then
    rm -rf .venv/apart/new
    DS_BUILD_OPS=0 python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --no-deps \
        --no-build-isolation --target .venv/apart/new deepspeed einops hjson msgpack ninja py-cpuinfo
    mv .venv/apart/new .venv/apart/deepspeed
fi
ruff check .
ruff format --check .
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
pytest -n 2 --dist loadfile "$@"
