#!/usr/bin/env bash
# Make token files from text: an array of jobs makes pieces, and one more job joins them.
#   bash examples/slurm/preprocess.sh [--dry-run] [option of sbatch ...] [-- option of tools/preprocess_data.py ...]
# shellcheck source=examples/slurm/submit.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/submit.sh"
split "$@"
pieces="$("${sbatch[@]}" "${options[@]}" examples/slurm/preprocess.sbatch "${overrides[@]}")"
pieces="${pieces%%;*}"
join="$(KD_JOIN=yes "${sbatch[@]}" "--dependency=afterok:$pieces" --kill-on-invalid-dep=yes "${options[@]}" --array=0 \
    examples/slurm/preprocess.sbatch "${overrides[@]}")"
printf 'pieces %s\njoin %s\n' "$pieces" "${join%%;*}"
