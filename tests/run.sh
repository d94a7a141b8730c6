#!/usr/bin/env bash
# Set up what the tests need and run them: `bash tests/run.sh [pytest arguments]`. About 25 minutes on 2 cores, set-up included.
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
# One stamp for what is installed: nothing is done again until the requirements change.
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
exec .venv/bin/python -m pytest "$@"
