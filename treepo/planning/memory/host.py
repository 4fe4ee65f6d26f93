"""Host memory of the fullest node: trainer ranks, engines, reward workers, the driver. Units: bytes.

With `plan.device: cpu` the memory of `treepo.planning.memory.trainer` is host memory too; it is not counted
here.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_bridge.architecture import read_architecture
from megatron_bridge.folder import SHARD_BYTES
from treepo.config.run import RunConfig
from treepo.planning.hardware import GIB
from treepo.planning.memory.engine import EngineMemory
from treepo.planning.memory.parts import Memory
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


def node_memory(config: RunConfig, folder: Path, trainer: Sequence[Memory], engine: EngineMemory) -> Memory:
    """The fullest node; if trainer and engines share nodes, it has both. trainer: one rank of each stage."""
    ranks = trainer_node(config, folder, trainer)
    engine_ranks = ranks_per_node(config, config.engine.count * config.engine.tensor)
    parts, notes = dict(ranks.parts), dict(ranks.notes)
    parts["engines"] = engine_ranks * _ENGINE_RANK
    notes["engines"] = f"{engine_ranks} x {_ENGINE_RANK / GIB:g} GiB of code and libraries"
    if shares_devices(config):
        parts["engines' offloaded weights"] = engine_ranks * engine.memory.parts["weights"]
        notes["engines' offloaded weights"] = "while the trainer computes"
    parts["reward workers"] = config.reward.workers * config.reward.memory_mb * 2.0**20
    notes["reward workers"] = f"{config.reward.workers} of at most {config.reward.memory_mb} MiB"
    parts["driver"] = _DRIVER
    notes["driver"] = "code, prompts, a step's trees; Ray"
    return Memory("host memory of a node", parts, notes)


def trainer_node(config: RunConfig, folder: Path, trainer: Sequence[Memory]) -> Memory:
    """The node whose trainer ranks need most, while a checkpoint is written and weights are sent.

    Ranks fill one node after the other.
    """
    parallel = config.trainer.parallel
    per_stage, size = parallel.tensor * parallel.data, ranks_per_node(config, parallel.ranks)
    ranks = [trainer[rank // per_stage] for rank in range(parallel.ranks)]
    nodes = [_node(config, ranks[first : first + size]) for first in range(0, parallel.ranks, size)]
    nodes[0] = nodes[0].plus({"outgoing weights": _outgoing(config, folder)})
    return max(nodes, key=lambda node: node.total)


def _node(config: RunConfig, ranks: Sequence[Memory]) -> Memory:
    process = _CPU_RANK if config.plan.device == "cpu" else _CUDA_RANK
    parts = {"trainer ranks": len(ranks) * process}
    if config.learning.kl_coefficient:
        parts["reference weights"] = 2 * sum(rank.parts["weights"] for rank in ranks)
    if config.checkpoint.every is not None:
        parts["checkpoint being written"] = sum(rank.subtotal(("weights", "optimizer")) for rank in ranks)
    notes = {
        "trainer ranks": f"{len(ranks)} x {process / GIB:g} GiB of code and libraries",
        "reference weights": "the initial ones; the current ones while the reference computes",
        "checkpoint being written": "each rank's weights and its share of the optimizer, copied",
        "outgoing weights": "buckets for the engines, or one file of an exported folder",
    }
    return Memory("trainer, host of one node", parts, notes)


def _outgoing(config: RunConfig, folder: Path) -> float:
    """The most that rank 0 holds of weights that leave it: buckets for the engines, or one exported file."""
    on_host = config.weights.transport != "broadcast"
    buckets = bucket_bytes(config, read_architecture(folder)) if on_host else 0.0
    return max(buckets, min(exported_bytes(config, folder), SHARD_BYTES))
