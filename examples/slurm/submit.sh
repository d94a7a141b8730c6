# shellcheck shell=bash disable=SC2034  # read by who sources it
# What the scripts share that submit several jobs: options of sbatch before --, overrides of the run file after it.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."

refuse() {
    printf 'slurm: error: %s\n' "$*" >&2
    exit 2
}

# split ARGUMENT...: sets options and overrides, and `sbatch`, the command; with --dry-run first, one that only prints.
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

# print_command WORD...: the command as it could be typed, and a number in the place of the job's.
print_command() {
    printf ' %q' "$@" >&2
    printf '\n' >&2
    printf '0\n'
}
