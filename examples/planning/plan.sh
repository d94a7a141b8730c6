#!/usr/bin/env bash
# Plan a 1B, a 3B and a 7B student on 100 billion tokens. This needs no GPU and runs on a login node.
# Arguments are passed to each plan.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-python}"
cluster=(--cluster examples/planning/cluster.toml --show 5)
"$python" tools/plan.py "${cluster[@]}" --preset llama-3.2-1b --teacher-preset llama-3.1-8b "$@"
echo
"$python" tools/plan.py "${cluster[@]}" --preset llama-3.2-3b --teacher-preset llama-3.1-8b "$@"
echo
"$python" tools/plan.py "${cluster[@]}" --preset glm-6.8b --teacher-preset glm-9b "$@"
