"""Host memory of the trainer's nodes, and the size of what it writes. Units: bytes.

On `plan.device: cpu` what `treepo.planning.trainer` says of devices is host memory, too, and not in here.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_bridge.architecture import read_architecture
from megatron_bridge.hf_folder import SHARD_BYTES
from megatron_bridge.layout_shards import Shard, expert_data_ranks
from megatron_bridge.tensor_surgery import padded_vocabulary
from treepo.config.run import RunConfig
from treepo.planning.hardware import GIB
from treepo.planning.memory import Memory, element_bytes
from treepo.planning.places import ranks_of_a_node
from treepo.planning.trainer import FLOAT32, optimizer_values, parameters, stage_shards
from treepo.planning.update_memory import bucket_bytes, exported_bytes

CPU_PROCESS = 0.85 * GIB
"""A rank's code and libraries, measured."""
CUDA_PROCESS = 3 * GIB
"""The same with CUDA's and NCCL's: an estimate."""


def checkpoint_bytes(config: RunConfig, folder: Path) -> float:
    """One training checkpoint: weights, moments and, of other dtypes than float32, master weights. The
    vocabulary is stored with the rows that tensor parallelism adds to it.
    """
    architecture = read_architecture(folder)
    vocabulary = architecture.dimensions.vocabulary
    added = padded_vocabulary(vocabulary, config.trainer.parallel.tensor) - vocabulary
    stored = parameters(folder) + added * architecture.hidden * (1 if architecture.tied else 2)
    return stored * (element_bytes(config) + FLOAT32 * optimizer_values(config))


def host_memory(config: RunConfig, folder: Path) -> Memory:
    """Of the node whose ranks need most, while a checkpoint is written and weights go out; ranks fill one
    node after the other.
    """
    parallel = config.trainer.parallel
    size = ranks_of_a_node(config, parallel.ranks)
    ranks = [_rank(config, shard) for shard in stage_shards(folder, parallel)]
    per_stage = parallel.tensor * parallel.data
    outgoing = _outgoing(config, folder)
    nodes = [
        _node(
            config,
            [ranks[rank // per_stage] for rank in range(first, min(first + size, parallel.ranks))],
            outgoing if first == 0 else 0.0,
        )
        for first in range(0, parallel.ranks, size)
    ]
    return max(nodes, key=lambda node: node.total)


def _outgoing(config: RunConfig, folder: Path) -> float:
    """What rank 0 holds at most of weights that leave it: buckets to the engines, or one exported file."""
    on_host = config.weights.transport != "broadcast"
    buckets = bucket_bytes(config, read_architecture(folder)) if on_host else 0.0
    return max(buckets, min(exported_bytes(config, folder), SHARD_BYTES))


@dataclass(frozen=True, slots=True)
class _Rank:
    """weights, optimizer: bytes of its own."""

    weights: float
    optimizer: float


def _rank(config: RunConfig, shard: Shard) -> _Rank:
    parallel = config.trainer.parallel
    own = shard.elements(expert=False) / parallel.data
    own += shard.elements(expert=True) / expert_data_ranks(parallel)
    return _Rank(element_bytes(config) * shard.elements(), own * FLOAT32 * optimizer_values(config))


def _node(config: RunConfig, ranks: list[_Rank], outgoing: float) -> Memory:
    process = CPU_PROCESS if config.plan.device == "cpu" else CUDA_PROCESS
    parts = {"processes": len(ranks) * process}
    notes = {"processes": f"{len(ranks)} x {process / GIB:g} GiB of code and libraries"}
    weights = sum(rank.weights for rank in ranks)
    if config.learning.kl_coefficient:
        parts["reference weights"] = 2 * weights
        notes["reference weights"] = "the initial weights, and the current ones while those score"
    if config.checkpoint.every is not None:
        parts["checkpoint being written"] = weights + sum(rank.optimizer for rank in ranks)
        notes["checkpoint being written"] = "each rank's weights and its share of the optimizer, copied"
    if outgoing:
        parts["weights on their way out"] = outgoing
        notes["weights on their way out"] = "buckets to the engines, or one file of an exported folder"
    return Memory("trainer, host of one node", parts, notes)
