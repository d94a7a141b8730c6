#!/usr/bin/env bash
# Build the documentation as a website in build/docs; every warning is an error.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-.venv/bin/python}" -m mkdocs build --quiet --strict --config-file .mkdocs.yml "$@"
