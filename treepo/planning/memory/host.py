"""Host memory of the fullest node: trainer ranks, engines, reward workers, the driver. Units: bytes.

With `plan.device: cpu` the memory of `treepo.planning.memory.trainer` is host memory too; it is not counted
here.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_bridge.architecture import read_architecture
from megatron_bridge.folder import SHARD_BYTES
from megatron_bridge.shards import Shard, expert_data_ranks
from treepo.config.run import RunConfig
from treepo.planning.hardware import GIB
from treepo.planning.memory.engine import EngineMemory
from treepo.planning.memory.parts import Memory, element_bytes
from treepo.planning.memory.trainer import optimizer_bytes, stage_shards
from treepo.planning.memory.weight_sync import bucket_bytes, exported_bytes
from treepo.planning.nodes import ranks_per_node, shares_devices

_CPU_RANK = 0.85 * GIB
"""Code and libraries of a trainer rank, measured."""
_CUDA_RANK = 3 * GIB
"""The same with CUDA and NCCL, estimated."""
_ENGINE_RANK = 3 * GIB
"""Code and libraries of an engine's scheduler and of the processes that talk to it, for each of its ranks."""
_DRIVER = 4 * GIB
"""The driver's code, prompts and a step's trees, and Ray's own processes."""


def node_memory(config: RunConfig, folder: Path, engine: EngineMemory) -> Memory:
    """The fullest node; if trainer and engines share nodes, it has both."""
    trainer = trainer_node_memory(config, folder)
    ranks = ranks_per_node(config, config.engine.count * config.engine.tensor)
    parts, notes = dict(trainer.parts), dict(trainer.notes)
    parts["engines"] = ranks * _ENGINE_RANK
    notes["engines"] = f"{ranks} x {_ENGINE_RANK / GIB:g} GiB of code and libraries"
    if shares_devices(config):
        parts["engines' offloaded weights"] = ranks * engine.memory.parts["weights"]
        notes["engines' offloaded weights"] = "while the trainer computes"
    parts["reward workers"] = config.reward.workers * config.reward.memory_mb * 2.0**20
    notes["reward workers"] = f"{config.reward.workers} of at most {config.reward.memory_mb} MiB"
    parts["driver"] = _DRIVER
    notes["driver"] = "code, prompts, a step's trees; Ray"
    return Memory("host memory of a node", parts, notes)


def trainer_node_memory(config: RunConfig, folder: Path) -> Memory:
    """The node whose trainer ranks need most, while a checkpoint is written and weights are sent.

    Ranks fill one node after the other.
    """
    parallel = config.trainer.parallel
    size = ranks_per_node(config, parallel.ranks)
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
    """The most that rank 0 holds of weights that leave it: buckets for the engines, or one exported file."""
    on_host = config.weights.transport != "broadcast"
    buckets = bucket_bytes(config, read_architecture(folder)) if on_host else 0.0
    return max(buckets, min(exported_bytes(config, folder), SHARD_BYTES))


@dataclass(frozen=True, slots=True)
class _Rank:
    """Bytes of one rank's weights and of its share of the optimizer state."""

    weights: float
    optimizer: float


def _rank(config: RunConfig, shard: Shard) -> _Rank:
    parallel = config.trainer.parallel
    owned = shard.elements(expert=False) / parallel.data
    owned += shard.elements(expert=True) / expert_data_ranks(parallel)
    return _Rank(element_bytes(config) * shard.elements(), owned * optimizer_bytes(config))


def _node(config: RunConfig, ranks: list[_Rank], outgoing: float) -> Memory:
    process = _CPU_RANK if config.plan.device == "cpu" else _CUDA_RANK
    parts = {"trainer ranks": len(ranks) * process}
    notes = {"trainer ranks": f"{len(ranks)} x {process / GIB:g} GiB of code and libraries"}
    weights = sum(rank.weights for rank in ranks)
    if config.learning.kl_coefficient:
        parts["reference weights"] = 2 * weights
        notes["reference weights"] = "the initial ones; the current ones while the reference computes"
    if config.checkpoint.every is not None:
        parts["checkpoint being written"] = weights + sum(rank.optimizer for rank in ranks)
        notes["checkpoint being written"] = "each rank's weights and its share of the optimizer, copied"
    if outgoing:
        parts["outgoing weights"] = outgoing
        notes["outgoing weights"] = "buckets for the engines, or one file of an exported folder"
    return Memory("trainer, host of one node", parts, notes)
