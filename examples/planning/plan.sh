#!/usr/bin/env bash
# Plans of a 1B, a 3B and a 7B student on 100 billion tokens, on a login node: no GPU is needed. Arguments go to each of them.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-python}"
cluster=(--cluster examples/planning/cluster.toml --show 5)
"$python" tools/plan.py "${cluster[@]}" --preset llama-3.2-1b --teacher-preset llama-3.1-8b "$@"
echo
"$python" tools/plan.py "${cluster[@]}" --preset llama-3.2-3b --teacher-preset llama-3.1-8b "$@"
echo
"$python" tools/plan.py "${cluster[@]}" --preset glm-6.8b --teacher-preset glm-9b "$@"
