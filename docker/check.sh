#!/usr/bin/env bash
# Check that the image works on this machine: treepo doctor, then the quickstart, with all GPUs if there are any.
#
#     docker/check.sh [IMAGE]        the default is treepo; DOCKER=podman names another container engine
#
# The exit code is 0 if both pass. Nothing is left behind: the containers remove themselves.
set -euo pipefail

image=${1:-treepo}
docker=${DOCKER:-docker}

say() { printf '\n== %s\n' "$*"; }

if ! command -v "$docker" >/dev/null; then
    echo "$docker is not on the PATH: install it, or name another engine with DOCKER=..." >&2
    exit 2
fi
if ! "$docker" image inspect "$image" >/dev/null; then
    echo "there is no image $image here: $docker build -t $image ." >&2
    exit 2
fi

# Docker's defaults are too small for these: docs/docker.md.
options=(--rm --shm-size=16g --ulimit memlock=-1 --ulimit nofile=65536:65536)
if command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus; then
    options+=(--gpus all)
    say "with the GPUs above"
else
    say "without a GPU"
fi

failed=()

say "doctor"
"$docker" run "${options[@]}" "$image" doctor || failed+=(doctor)

say "quickstart"
"$docker" run "${options[@]}" --entrypoint sh "$image" -c \
    'treepo toy && treepo train examples/quickstart.yaml' || failed+=(quickstart)

if ((${#failed[@]})); then
    say "$image failed: ${failed[*]}"
    exit 1
fi
say "$image works here"
