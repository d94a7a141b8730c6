#!/usr/bin/env bash
# Build an image with docker, podman or buildah: bash docker/build.sh cpu|gpu [BUILD OPTION ...]
#
#   ENGINE=buildah          choose one of the three (default: the first that is installed)
#   TAG=megatron_kd:cpu     name of the image
#   BASE=debian             another base image; `debian` creates one with debootstrap, where no
#                           registry can be reached (needs root and buildah)
#   MIRROR=URL              Debian mirror for debootstrap
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "build.sh: error: $*" >&2
    exit 2
}

kind=${1:-}
case "$kind" in
    cpu) file=docker/Dockerfile.cpu ;;
    gpu) file=docker/Dockerfile ;;
    *) fail "say which image: bash docker/build.sh cpu, or gpu" ;;
esac
shift
tag=${TAG:-megatron_kd:$kind}
engine=${ENGINE:-}
if [ -z "$engine" ]; then
    for name in docker podman buildah; do
        if command -v "$name" >/dev/null; then
            engine=$name
            break
        fi
    done
fi
[ -n "$engine" ] || fail "none of docker, podman and buildah was found"
command -v "$engine" >/dev/null || fail "$engine was not found"

# As root without overlay mounts or user namespaces only these options work. They do not change the
# image.
build=("$engine" build)
storage=()
if [ "$engine" = buildah ]; then
    [ "$(id -u)" != 0 ] || storage=(--storage-driver vfs)
    build=(buildah "${storage[@]}" build)
    [ "$(id -u)" != 0 ] || build+=(--isolation chroot)
fi

if [ "${BASE:-}" = debian ]; then
    [ "$engine" = buildah ] || fail "BASE=debian is for buildah"
    command -v debootstrap >/dev/null || fail "debootstrap was not found"
    BASE=localhost/megatron_kd_debian:bookworm
    if ! buildah "${storage[@]}" inspect --type image "$BASE" >/dev/null 2>&1; then
        root=$(mktemp -d)
        trap 'rm -rf "$root"' EXIT
        debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm \
            "$root" "${MIRROR:-http://deb.debian.org/debian}"
        container=$(buildah "${storage[@]}" from scratch)
        buildah "${storage[@]}" add --quiet "$container" "$root" /
        buildah "${storage[@]}" commit --quiet --rm "$container" "$BASE"
    fi
fi
[ -z "${BASE:-}" ] || build+=(--build-arg "BASE=$BASE")

exec "${build[@]}" --file "$file" --tag "$tag" "$@" .
