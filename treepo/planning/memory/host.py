"""Host memory of the fullest node: trainer ranks, engines, reward workers, the driver. Units: bytes.

With `plan.device: cpu` the trainer's own memory (memory/trainer.py) is host memory too, but not counted here.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_bridge.hf_folder import SHARD_BYTES
from treepo.config.run import RunConfig
from treepo.planning.architecture import planned_architecture
from treepo.planning.hardware import GIB
from treepo.planning.memory.engine import EngineMemory
from treepo.planning.memory.parts import FLOAT32, Memory, element_bytes
from treepo.planning.memory.routes import on_host
from treepo.planning.memory.trainer import offloaded
from treepo.planning.memory.weight_sync import bucket_bytes, exported_bytes, sent_bytes, sources
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
    count = ranks_per_node(config, config.engine.count * config.engine.ranks)
    note = f"{count} x {_ENGINE_RANK / GIB:g} GiB of code and libraries"
    engines: dict[str, tuple[float, str]] = {"engines": (count * _ENGINE_RANK, note)}
    if shares_devices(config):
        offloaded = count * engine.memory.parts["weights"]
        engines["engines' offloaded weights"] = offloaded, "while the trainer computes"
    if _keeps_bytes(config):
        kept = engine.memory.parts["weights"] if config.served_lora is None else sent_bytes(config, folder)
        engines["received weights"] = count * kept, "of each rank, to which weights.delta applies changes"
    engines |= on_host(config, folder, engine, count)
    reward = config.reward
    others = {
        "reward workers": (
            reward.workers * reward.memory_mb * 2.0**20,
            f"{reward.workers} of at most {reward.memory_mb} MiB",
        ),
        "driver": (_DRIVER, "code, prompts, a step's trees; Ray"),
    }
    return Memory(
        "host memory of a node", {**trainer_node(config, folder, trainer).noted, **engines, **others}
    )


def trainer_node(config: RunConfig, folder: Path, trainer: Sequence[Memory]) -> Memory:
    """The node whose trainer ranks need most, while a checkpoint is written and weights are sent.

    Ranks fill one node after the other.
    """
    parallel = config.trainer.parallel
    per_stage, size = parallel.stage_ranks, ranks_per_node(config, parallel.ranks)
    ranks = [trainer[rank // per_stage] for rank in range(parallel.ranks)]
    nodes = [_node(config, ranks[first : first + size]) for first in range(0, parallel.ranks, size)]
    outgoing = _outgoing(config, folder), "buckets for the engines, or one file of an exported folder"
    nodes[0] = nodes[0].plus({"outgoing weights": outgoing})
    if _keeps_bytes(config):
        lanes = sources(config)
        kept = sent_bytes(config, folder) * min(size, lanes) / lanes
        nodes[0] = nodes[0].plus({"sent weights": (kept, "of its sources, for the next weights.delta")})
    return max(nodes, key=lambda node: node.total)


def _node(config: RunConfig, ranks: Sequence[Memory]) -> Memory:
    process = _CPU_RANK if config.plan.device == "cpu" else _CUDA_RANK
    note = f"{len(ranks)} x {process / GIB:g} GiB of code and libraries"
    parts: dict[str, tuple[float, str]] = {"trainer ranks": (len(ranks) * process, note)}
    if config.learning.kl_coefficient and config.trainer.lora is None:
        weights = sum(rank.parts["weights"] for rank in ranks)
        note = "the initial ones, and room for the current ones while the reference computes"
        parts["reference weights"] = 2 * weights, note
    if shares_devices(config) and (away := offloaded(config)):
        moved = sum(rank.subtotal(away) for rank in ranks)
        parts["trainer.offload"] = moved, f"{' and '.join(away)} of each rank, while engines sample"
    if config.checkpoint.every is not None:
        trained = element_bytes(config) / FLOAT32  # of their gradients
        copied = sum(trained * rank.parts["gradients"] + rank.parts["optimizer"] for rank in ranks)
        note = "each rank's trained weights and its share of the optimizer, copied"
        parts["checkpoint being written"] = copied, note
    return Memory("trainer, host of one node", parts)


def _keeps_bytes(config: RunConfig) -> bool:
    """Whether both ends of a weight sync keep its bytes on the host."""
    return config.weights.delta and config.weights.transport == "host_broadcast"


def _outgoing(config: RunConfig, folder: Path) -> float:
    """The most that a node holds of weights that leave it: buckets of its sources, or one exported file."""
    on_host = config.weights.transport != "broadcast"
    here = ranks_per_node(config, config.trainer.parallel.ranks)
    buckets = sum(bucket_bytes(config, planned_architecture(folder))[:here]) if on_host else 0.0
    return max(buckets, min(exported_bytes(config, folder), SHARD_BYTES))
