# shellcheck shell=bash disable=SC2034  # read by the scripts that source it
# Functions of the scripts that submit several jobs. Options of sbatch come before --, overrides of the
# run file after it.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."

refuse() {
    printf 'slurm: error: %s\n' "$*" >&2
    exit 2
}

# split ARGUMENT...: set `options`, `overrides` and the command `sbatch`, which only prints if the first
# argument is --dry-run.
split() {
    local value
    for value in "$@"; do
        [[ $value != *[[:cntrl:]]* ]] || refuse "an argument has a newline or another control character: $(printf '%q' "$value")"
    done
    options=() overrides=() sbatch=(sbatch --parsable)
    if [[ ${1:-} == --dry-run ]]; then
        sbatch=(print_command sbatch --parsable)
        shift
    fi
    while [[ $# -gt 0 && $1 != -- ]]; do
        options+=("$1")
        shift
    done
    if [[ $# -gt 0 ]]; then
        shift
        overrides=("$@")
    fi
}

# print_command WORD...: print the command, quoted for a shell, and 0 as the number of the job.
print_command() {
    printf ' %q' "$@" >&2
    printf '\n' >&2
    printf '0\n'
}
