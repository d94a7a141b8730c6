#!/usr/bin/env bash
# Install what the tests need and run them: `bash tests/run.sh [pytest arguments]`.
# Without arguments: lint, types and the plain tests, about 10 minutes on 2 cores with two workers.
# The longer tests: bash tests/run.sh -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\n== %s\n' "$*"; }

find_python() {
    local name
    for name in "${PYTHON:-}" python3.11 python3.12 python3.13 python3 python; do
        if [ -n "$name" ] && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            echo "$name"
            return
        fi
    done
    echo "No Python 3.11 or newer was found: install one, or name it with PYTHON=/path/to/python" >&2
    return 1
}

if [ ! -x .venv/bin/python ]; then
    python=$(find_python)
    say "Making .venv with $($python --version)"
    "$python" -m venv .venv
fi
# A stamp of the installed requirements: nothing is installed again until they change.
wanted=$(cat setup.py constraints.txt | cksum)
if [ "$(cat .venv/tests-installed 2>/dev/null)" != "$wanted" ]; then
    say "Installing the package and its test tools with constraints.txt (1-3 minutes)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[test]"
    echo "$wanted" > .venv/tests-installed
fi

if [ $# -eq 0 ]; then
    say "Lint and format (ruff)"
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    say "Types (mypy)"
    .venv/bin/mypy
fi
say "Tests (pytest)"
if [ $# -eq 0 ]; then
    # Tests that measure the machine run after the others, alone.
    .venv/bin/python -m pytest -n 2 --dist loadfile -m "not slow and not study and not alone"
    exec .venv/bin/python -m pytest -m "alone and not slow and not study"
fi
exec .venv/bin/python -m pytest "$@"
