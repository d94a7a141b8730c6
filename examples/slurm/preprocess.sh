#!/usr/bin/env bash
# Token files from text: an array of jobs makes the pieces, and one more joins them when all are there.
#   bash examples/slurm/preprocess.sh [--dry-run] [option of sbatch ...] [-- option of tools/preprocess_data.py ...]
# shellcheck source=examples/slurm/submit.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/submit.sh"
split "$@"
pieces="$("${sbatch[@]}" "${options[@]}" examples/slurm/preprocess.sbatch "${overrides[@]}")"
pieces="${pieces%%;*}"
join="$(KD_JOIN=yes "${sbatch[@]}" "--dependency=afterok:$pieces" --kill-on-invalid-dep=yes "${options[@]}" --array=0 \
    examples/slurm/preprocess.sbatch "${overrides[@]}")"
printf 'pieces %s\njoin %s\n' "$pieces" "${join%%;*}"
