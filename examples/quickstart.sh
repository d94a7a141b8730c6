#!/usr/bin/env bash
# Distill a student on an empty machine with two CPU cores in about ten minutes.
# examples/README.md explains it. Options: bash examples/quickstart.sh --help
set -euo pipefail

repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

usage() {
    cat <<END
usage: bash examples/quickstart.sh [--directory DIR] [--steps-scale X] [--smoke] [--fresh] [--help]

Installs the package into .venv (or uses the active environment if everything is installed there),
makes a tokenizer and token files from the sources of the Python standard library, trains a teacher,
then a smaller student twice: alone, and distilled from the teacher. Ends with a table and
DIR/curves.png. Only Python packages are downloaded. Finished stages are kept: after an interruption,
run the same command again.

  --directory DIR    output folder (runs/quickstart; with --smoke, runs/quickstart-smoke)
  --steps-scale X    multiply all steps by X, X > 0 (1)
  --seed N           seed of the students' weights and data order (default: in student.toml)
  --smoke            a minute of training, to see that everything works; its losses mean nothing
  --fresh            delete the results of an earlier run in DIR and start over
  --help             print this

PYTHON=/path/to/python chooses the interpreter of .venv (3.11 or newer).
END
}

say() { printf '%s\n' "$*"; }
die() { # the reason has the remedy, so the trap below must print nothing
    trap - EXIT
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
[[ $directory != *[\"\\]* ]] || die "--directory must be a name without quotes and backslashes"
cd "$repo"

# --- stages -----------------------------------------------------------------------------------------

stage="starting"
explain() {
    local status=$?
    [[ $status -eq 0 ]] && return
    printf 'quickstart: stopped in stage "%s" (exit status %s); the reason is above. ' "$stage" "$status" >&2
    printf 'Running the same command again continues there.\n' >&2
}
trap explain EXIT

begin() {
    stage="$1"
    stage_start=$SECONDS
    say
    say "== $1"
}
end() { say "== done: $stage, $((SECONDS - stage_start)) s"; }

# kept STAMP SETTINGS: succeed if the stage with this STAMP is finished. Changed settings are refused.
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

# installed: succeed if this checkout and its requirements are installed. pip installs the package last.
installed() {
    (cd / && "$python" - "$repo") >/dev/null 2>&1 <<'END'
import sys
from importlib.metadata import requires, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

assert Path(find_spec("megatron_kd").origin).resolve().parents[1] == Path(sys.argv[1]).resolve()
for requirement in map(Requirement, requires("megatron-kd")):
    if requirement.marker is None or requirement.marker.evaluate({"extra": "report"}):
        assert requirement.specifier.contains(version(requirement.name), prereleases=True), requirement
END
}

install() {
    begin "1 of 6: install into .venv"
    if [[ ! -x $python ]]; then
        local base
        base="$(find_python)"
        say "making .venv with $base ($("$base" --version))"
        "$base" -m venv "$repo/.venv"
    fi
    if installed; then
        say "already installed"
    else
        # setuptools builds the editable install; later Pythons leave it out of a new environment.
        "$python" -m pip install --disable-pip-version-check --quiet -c constraints.txt setuptools wheel
        say "installing megatron_kd with torch and megatron-core; this is most of the waiting before the training"
        "$python" -m pip install --disable-pip-version-check --quiet --no-build-isolation --use-pep517 \
            -c constraints.txt -e ".[report]"
    fi
    end
}

# text: choose the corpus, the sources of Python's standard library, which every machine has. It leaves
# out tests, installed packages, and tables and texts that are not code. Whole files are held out, so
# that validation has no text next to training text.
text() {
    local corpus
    corpus="$("$python" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
    chosen=(--input "$corpus" --pattern '*.py'
        --exclude test tests idle_test site-packages dist-packages encodings pydoc_data __pycache__ 'config-*')
}

tokenizer() {
    begin "2 of 6: train the tokenizer"
    kept "$data/tokenizer.done" "$vocabulary" && return
    "$python" tools/train_tokenizer.py "${chosen[@]}" --vocab-size "$vocabulary" --output "$data/tokenizer.model"
    printf '%s\n' "$vocabulary" >"$data/tokenizer.done"
    end
}

tokens() {
    begin "3 of 6: write token files"
    kept "$data/tokens.done" "$vocabulary" && return
    "$python" tools/preprocess_data.py "${chosen[@]}" --tokenizer "$data/tokenizer.model" \
        --output "$data/train" --holdout heldout=0.03
    printf '%s\n' "$vocabulary" >"$data/tokens.done"
    end
}

# scaled FILE: print overrides that multiply the steps of a run file by --steps-scale; none for 1.
scaled() {
    "$python" - "$1" "$scale" "$smoke" <<'END'
import sys
import tomllib

with open(sys.argv[1], "rb") as stream:
    run, scale = tomllib.load(stream), float(sys.argv[2])
if scale != 1:
    steps = max(4, round(run["train"]["steps"] * scale))
    total = run["train"]["steps"]
    print("--train.steps", steps)
    print("--optimizer.warmup_steps", round(run["optimizer"]["warmup_steps"] * steps / total))
    print("--train.evaluate_interval", max(1, round(run["train"]["evaluate_interval"] * steps / total)))
    print("--telemetry.log_interval", min(run["telemetry"]["log_interval"], max(1, steps // 20)))
if sys.argv[3] == "yes":
    print("--train.evaluate_batches", 4)
END
}

# train TITLE NAME FILE [OVERRIDE ...]: train one run on two processes with one thread each. The program
# itself resumes an interrupted run from its last checkpoint.
train() {
    local title="$1" name="$2" file="$3" settings overrides
    shift 3
    begin "$title"
    overrides="$(scaled "$file")"
    settings="$(cksum <"$file") $overrides $*"
    # One stamp is written before the run, to refuse other settings, and one after it.
    if [[ -e $directory/$name/settings ]]; then
        kept "$directory/$name/settings" "$settings" >/dev/null
    fi
    kept "$directory/$name/done" "$settings" && return
    mkdir -p "$directory/$name"
    printf '%s\n' "$settings" >"$directory/$name/settings"
    # shellcheck disable=SC2086  # the overrides are several words
    OMP_NUM_THREADS=1 "$python" -m torch.distributed.run --standalone --nproc-per-node 2 -m megatron_kd.pretrain --config "$file" \
        --data.tokenizer "$data/tokenizer.model" --data.train "[\"$data/train\"]" --data.valid "{\"heldout\": \"$data/heldout\"}" \
        --data.index_cache "$data/index_cache" --run.directory "$directory/$name" $overrides "$@"
    printf '%s\n' "$settings" >"$directory/$name/done"
    end
}

report() {
    stage="report"
    say
    "$python" tools/report.py "$directory"/{teacher,student,distilled} --labels teacher "student alone" "student distilled" \
        --output "$directory/curves.png" --json "$directory/report.json"
    say
    say "curves: $directory/curves.png"
    say "numbers: $directory/report.json; every step: $directory/{teacher,student,distilled}/metrics.jsonl"
    say "all stages together: $SECONDS s"
}

# Use an active environment with this checkout and its requirements, such as that of the images.
python="${VIRTUAL_ENV:-$repo/.venv}/bin/python"
installed || python="$repo/.venv/bin/python"
data="$directory/data"
vocabulary=1024
install
if [[ $fresh == yes ]]; then
    # Delete only what this script writes: the folder may have other files.
    rm -rf "$data" "$directory"/{teacher,student,distilled} "$directory"/{curves.png,report.json}
fi
mkdir -p "$data"
chosen=()
text
tokenizer
tokens
seeded=()
[[ -z $seed ]] || seeded=(--train.seed "$seed")
train "4 of 6: train the teacher" teacher examples/quickstart/teacher.toml
train "5 of 6: train the student alone" student examples/quickstart/student.toml ${seeded[@]+"${seeded[@]}"}
# The same run file: the teacher is the only difference.
train "6 of 6: train the student with the teacher" distilled examples/quickstart/student.toml ${seeded[@]+"${seeded[@]}"} \
    --teacher.source online --teacher.checkpoint "$directory/teacher"
report
