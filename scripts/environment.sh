# Makes .venv with the project and its tests' needs, once; sourced by quickstart.sh and test.sh.
# A second call is immediate: the environment is made anew only when what it is made from has changed.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3 python; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 or newer is needed; none was found (set PYTHON to its path)" >&2
    return 1
}

make_environment() {
    local stamp=.venv/made-from wanted python
    wanted=$(cat pyproject.toml .ci/constraints.txt | cksum)
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return
    fi
    python=$(find_python)
    echo "making the environment in .venv (several GB the first time, a few minutes)"
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[test]'
    echo "$wanted" >"$stamp"
}

# Two scripts started at once wait for one another.
if command -v flock >/dev/null; then
    exec 9>"${TMPDIR:-/tmp}/hfprune-environment-$(pwd | cksum | cut -d' ' -f1).lock"
    flock 9
    make_environment
    exec 9>&-
else
    make_environment
fi
export PATH="$PWD/.venv/bin:$PATH"
