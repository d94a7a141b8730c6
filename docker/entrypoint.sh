#!/bin/sh
# What a container of megatron_kd does:
#   pretrain --config run.toml ...      the program, in one process
#   torchrun ... -m megatron_kd.pretrain ..., bash, any other command
#   TOOL ...                            a program of tools/, by name: preprocess_data --input corpus/ ...
#   test [pytest arguments]             the test suite
#   help                                this, the tools, and the versions in the image
# Signals reach the program itself: it saves and leaves with exit code 85 when asked to (see README.md, "Exit codes").
set -eu
home=/opt/megatron_kd
[ -d "$home/megatron_kd" ] || home=$(cd "$(dirname "$0")/.." && pwd)

# Compute nodes have no way out, and a name that is not found there must fail at once. `-e HF_HUB_OFFLINE=0` allows it.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" HF_DATASETS_OFFLINE="${HF_DATASETS_OFFLINE:-1}"
# Containers often run with a user id that has no home: what is compiled and cached must go somewhere.
if [ ! -w "${HOME:-/}" ]; then
    HOME=$(mktemp -d)
    export HOME
fi
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$HOME/.triton}" XDG_CACHE_HOME="${XDG_CACHE_HOME:-$HOME/.cache}"

# NCCL and worker processes share memory here; docker's 64 MiB end a run in the middle with a bus error.
shared=$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 { print $2 }')
if [ -n "$shared" ] && [ "$shared" -lt 1048576 ]; then
    echo "megatron_kd: warning: /dev/shm has only $((shared / 1024)) MiB: start the container with --ipc=host or --shm-size=8g" >&2
fi

case "${1:-help}" in
    help)
        sed -n '2,8s/^# \{0,1\}//p' "$0"
        printf '\ntools:'
        for tool in "$home"/tools/*.py; do printf ' %s' "$(basename "$tool" .py)"; done
        printf '\n\n'
        exec python3 -c 'from importlib.metadata import version as v, PackageNotFoundError as e
for name in ("megatron-kd", "torch", "megatron-core", "transformer-engine", "flash-attn", "triton", "deepspeed", "sentencepiece"):
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
