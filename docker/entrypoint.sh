#!/bin/sh
# Commands of a container of megatron_kd:
#   pretrain --config run.toml ...      train in one process
#   torchrun ... -m megatron_kd.pretrain ..., bash, or any other command
#   TOOL ...                            run a program of tools/: preprocess_data --input corpus/ ...
#   test [pytest arguments]             run the test suite
#   help                                print this, the tools, and the versions in the image
# Signals reach the program, which saves a checkpoint and exits with code 85 (see README.md).
set -eu
home=/opt/megatron_kd
[ -d "$home/megatron_kd" ] || home=$(cd "$(dirname "$0")/.." && pwd)

# Compute nodes often have no network: a missing model must fail at once instead of timing out.
# `-e HF_HUB_OFFLINE=0` allows downloads.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" HF_DATASETS_OFFLINE="${HF_DATASETS_OFFLINE:-1}"
# Containers often run with a user id without a home: compiled and cached files need a folder.
if [ ! -w "${HOME:-/}" ]; then
    HOME=$(mktemp -d)
    export HOME
fi
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$HOME/.triton}"
export XDG_CACHE_HOME="${XDG_CACHE_HOME:-$HOME/.cache}"

# NCCL and worker processes use /dev/shm. Docker's default of 64 MiB ends a run with a bus error.
shared=$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 { print $2 }')
if [ -n "$shared" ] && [ "$shared" -lt 1048576 ]; then
    echo "megatron_kd: warning: /dev/shm has only $((shared / 1024)) MiB: start the container" \
        "with --ipc=host or --shm-size=8g" >&2
fi

case "${1:-help}" in
    help)
        sed -n '2,8s/^# \{0,1\}//p' "$0"
        printf '\ntools:'
        for tool in "$home"/tools/*.py; do printf ' %s' "$(basename "$tool" .py)"; done
        printf '\n\n'
        exec python3 -c 'from importlib.metadata import version as v, PackageNotFoundError as e
for name in ("megatron-kd", "torch", "megatron-core", "transformer-engine", "flash-attn", "triton",
             "deepspeed", "sentencepiece"):
    try: print(f"{name} {v(name)}")
    except e: pass'
        ;;
    pretrain)
        shift
        exec python3 -m megatron_kd.pretrain "$@"
        ;;
    test)
        shift
        cd "$home"
        export HYPOTHESIS_STORAGE_DIRECTORY="${HYPOTHESIS_STORAGE_DIRECTORY:-$HOME/.hypothesis}"
        exec python3 -m pytest -p no:cacheprovider "$@"
        ;;
    *[!a-z_]*) exec "$@" ;;
    *)
        if [ -f "$home/tools/$1.py" ]; then
            tool=$1
            shift
            exec python3 "$home/tools/$tool.py" "$@"
        fi
        exec "$@"
        ;;
esac
