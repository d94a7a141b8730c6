#!/usr/bin/env bash
# Store the teacher's targets once with an array of jobs, then train an array of students on them.
#   bash examples/slurm/two_phase.sh [--dry-run] [option of sbatch ...] [-- --section.key value ...]
# KD_CACHE is the folder of the cache, KD_CONFIG the run file of the extraction.
# shellcheck source=examples/slurm/submit.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/submit.sh"
split "$@"
cache="$("${sbatch[@]}" "${options[@]}" examples/slurm/cache.sbatch "${overrides[@]}")"
cache="${cache%%;*}" # the name of a cluster may follow
students="$("${sbatch[@]}" "--dependency=afterok:$cache" --kill-on-invalid-dep=yes "${options[@]}" \
    examples/slurm/students_from_cache.sbatch "${overrides[@]}")"
printf 'cache %s\nstudents %s\n' "$cache" "${students%%;*}"
