#!/usr/bin/env bash
# Submit a chain of jobs, for clusters that do not requeue. They have one name, so that Slurm runs one
# after the other (--dependency=singleton). Each resumes from the last checkpoint. A job that finishes,
# or that must not be started again, cancels the rest.
#   bash examples/slurm/chain.sh COUNT SCRIPT [--dry-run] [option of sbatch ...] [-- --section.key value ...]
# shellcheck source=examples/slurm/submit.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/submit.sh"
[[ ${1:-} =~ ^[1-9][0-9]{0,2}$ && -r ${2:-} ]] || refuse "usage: bash examples/slurm/chain.sh COUNT SCRIPT [option of sbatch ...] [-- override ...]"
count="$1" script="$2"
shift 2
split "$@"
# The name is unique, because the rest of a chain is cancelled by name. scancel separates names with
# commas.
KD_CHAIN="$(basename -- "$script" .sbatch)"
KD_CHAIN="${KD_CHAIN//[^A-Za-z0-9_-]/_}-$(date +%Y%m%d-%H%M%S)-$$"
export KD_CHAIN
for ((link = 1; link <= count; link++)); do
    job="$("${sbatch[@]}" "${options[@]}" --dependency=singleton "--job-name=$KD_CHAIN" "$script" "${overrides[@]}")"
    printf 'link %s of %s: %s\n' "$link" "$count" "${job%%;*}"
done
