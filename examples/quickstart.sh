#!/usr/bin/env bash
# Distillation from an empty machine to a table and a picture, on two CPU cores in about ten minutes.
# What it does and how to change it: examples/README.md. Options: bash examples/quickstart.sh --help
set -euo pipefail

repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
files="$repo/examples/quickstart"

usage() {
    cat <<END
usage: bash examples/quickstart.sh [--directory DIR] [--steps-scale X] [--smoke] [--fresh] [--help]

Installs the package into .venv, makes a tokenizer and token files from the Python standard library's own sources, trains a
teacher, then a smaller student twice: alone, and distilled from the teacher. Ends with a table and DIR/curves.png. Nothing is
downloaded but Python packages. Finished stages are kept: after an interruption, run the same command again.

  --directory DIR    where everything is written (runs/quickstart; with --smoke, runs/quickstart-smoke)
  --steps-scale X    multiply all steps by X, X > 0 (1)
  --seed N           seed of the students' weights and data order (that in student.toml)
  --smoke            a minute of training, to see that everything works; its losses mean nothing
  --fresh            delete what an earlier run wrote in DIR and start over
  --help             print this

PYTHON=/path/to/python chooses the interpreter that .venv is made with (3.11 or newer).
END
}

say() { printf '%s\n' "$*"; }
die() {
    printf 'quickstart: %s\n' "$*" >&2
    exit 1
}

directory="" scale="" seed="" fresh=no smoke=no
while [[ $# -gt 0 ]]; do
    case "$1" in
        --directory | --steps-scale | --seed)
            [[ $# -ge 2 ]] || die "$1 needs a value (see --help)"
            case "$1" in
                --directory) directory="$2" ;;
                --steps-scale) scale="$2" ;;
                --seed) seed="$2" ;;
            esac
            shift 2
            ;;
        --smoke) smoke=yes; shift ;;
        --fresh) fresh=yes; shift ;;
        --help | -h) usage; exit 0 ;;
        *) die "unknown option $1 (see --help)" ;;
    esac
done
if [[ $smoke == yes ]]; then
    directory="${directory:-$repo/runs/quickstart-smoke}"
    scale="${scale:-0.01}"
fi
directory="${directory:-$repo/runs/quickstart}"
scale="${scale:-1}"
[[ $scale =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)$ && $scale =~ [1-9] ]] || die "--steps-scale must be a number above 0, got $scale"
[[ -z $seed || $seed =~ ^[0-9]+$ ]] || die "--seed must be a whole number, got $seed"
[[ $directory == /* ]] || directory="$PWD/$directory"

# --- stages -------------------------------------------------------------------------------------------------------------------

stage="starting"
trap 'status=$?; [[ $status -eq 0 ]] || printf "quickstart: stopped in stage \"%s\" (exit status %s); the reason is above. Running the same command again continues there.\n" "$stage" "$status" >&2' EXIT

begin() {
    stage="$1"
    stage_start=$SECONDS
    say
    say "== $1"
}
end() { say "== done: $stage, $((SECONDS - stage_start)) s"; }

# kept STAMP SETTINGS: true when the stage that left STAMP is finished. Settings that have changed since are refused, not mixed.
kept() {
    [[ -e $1 ]] || return 1
    [[ $(<"$1") == "$2" ]] || die "$1 was left by other settings: start over with --fresh, or choose another --directory"
    say "kept from an earlier run"
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "no Python 3.11 or newer with the venv module found (tried: ${PYTHON:-python3.11 python3.12 python3.13 python3 python}): install one (Debian and Ubuntu: python3 and python3-venv), or set PYTHON"
}

# installed: true when this checkout and everything it asks for is in .venv. pip installs the package itself last.
installed() {
    "$python" - "$repo" >/dev/null 2>&1 <<'END'
import pathlib, sys
from importlib.metadata import requires, version
from importlib.util import find_spec
from packaging.requirements import Requirement

# Not from the current folder, which would find the package without its being installed.
sys.path = [entry for entry in sys.path if entry not in ("", sys.argv[1])] if version("megatron-kd") else []
for line in requires("megatron-kd"):
    wanted = Requirement(line)
    if wanted.marker is None or wanted.marker.evaluate({"extra": "report"}):
        assert wanted.specifier.contains(version(wanted.name), prereleases=True), line
END
}
