#!/usr/bin/env bash
# A training run on two machines without a scheduler. On each of them, in the same folder of a filesystem that
# both share:
#
#     examples/cluster/two_nodes.sh 0 HEAD [KEY=VALUE]...      # on the first, whose name or address HEAD is
#     examples/cluster/two_nodes.sh 1 HEAD [KEY=VALUE]...      # on the second, with the same arguments
#
# In either order, within ten minutes. Ctrl-C on the first ends the training and then both. If the first itself
# crashes, start it again with --resume: the second waits ten minutes for it.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[01]$ ]]; then
    echo "usage: $0 0|1 HEAD[:PORT] [KEY=VALUE]..." >&2
    exit 2
fi
rank=$1 head=$2
shift 2
exec .venv/bin/treepo launch examples/cluster/two_nodes.yaml \
    --nodes 2 --node-rank "$rank" --head "$head" "$@"
