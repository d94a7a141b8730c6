#!/usr/bin/env bash
# The teacher's targets are stored once, by an array of jobs; when all of its tasks have finished, an array of students is trained on them.
#   bash examples/slurm/two_phase.sh [--dry-run] [option of sbatch ...] [-- --section.key value ...]
# KD_CACHE is the folder of the cache, KD_CONFIG the run file that says what to store.
# shellcheck source=examples/slurm/submit.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/submit.sh"
split "$@"
cache="$("${sbatch[@]}" "${options[@]}" examples/slurm/cache.sbatch "${overrides[@]}")"
cache="${cache%%;*}" # a cluster's name can follow
students="$("${sbatch[@]}" "--dependency=afterok:$cache" --kill-on-invalid-dep=yes "${options[@]}" \
    examples/slurm/students_from_cache.sbatch "${overrides[@]}")"
printf 'cache %s\nstudents %s\n' "$cache" "${students%%;*}"
