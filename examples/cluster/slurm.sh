#!/usr/bin/env bash
# A training run on the nodes of a Slurm job, the same command once on each:
#
#     sbatch examples/cluster/slurm.sh [CONFIG] [KEY=VALUE]...
#
# Submit it from the repository's folder, on a filesystem that all nodes share. treepo runs in .venv there, or
# in the container that TREEPO_IMAGE names (Slurm with pyxis):
#
#     TREEPO_IMAGE=registry/treepo:0.1.0 sbatch examples/cluster/slurm.sh
#
#SBATCH --job-name=treepo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=treepo-%j.log
# If Slurm loses a node, it ends the job and queues it again; the run then continues from its newest checkpoint.
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

config=examples/cluster/two_nodes.yaml
case "${1:-}" in
*.yaml)
    config=$1
    shift
    ;;
esac

# If the nodes have several networks, name the one that they share:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# treepo launch itself starts a crashed training again (--max-restarts). A node that has failed for good ends the
# others. --resume begins a new run if there is no checkpoint yet. At SIGTERM (scancel, the time limit) the
# training ends within 60 s, of which the cluster's KillWait may leave less (30 s by default).
step=(srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-64}")
if [[ -n ${TREEPO_IMAGE:-} ]]; then
    step+=(--container-image="$TREEPO_IMAGE" --container-mounts="$PWD:$PWD" --container-workdir="$PWD")
    exec "${step[@]}" treepo launch "$config" --resume "$@"
fi
exec "${step[@]}" .venv/bin/treepo launch "$config" --resume "$@"
