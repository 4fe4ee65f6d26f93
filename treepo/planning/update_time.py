"""Seconds of a weight update on paper. Nothing in here was measured on a GPU.

Bucket k + 1 is gathered on rank 0 while bucket k travels and is loaded (docs/weights.md), so the slower of
the two sets the pace, and the other is waited for once. What it holds meanwhile: update_memory.py. Units:
bytes, seconds.
"""

from math import ceil, log2
from pathlib import Path

from megatron_bridge.architecture import read_architecture
from treepo.config.run import RunConfig
from treepo.planning.engine_shard import engine_shard
from treepo.planning.hardware import Device, device
from treepo.planning.memory import element_bytes
from treepo.planning.phase import Phase
from treepo.planning.places import on_one_node, places
from treepo.planning.update_memory import bucket_bytes, exported_bytes

HOST_LINK = 25e9
"""Bytes a second between a GPU and its host: PCIe 5, pinned, one direction at a time."""
FILE_SYSTEM = 5e9
"""Bytes a second that a shared file system is written at, and read again."""
GLOO = 2e9
"""Bytes a second from one host to one other by gloo; its broadcasts go through a binary tree, hop by hop."""


def update_seconds(config: RunConfig, folder: Path) -> Phase:
    """From the trainer's last step to engines that serve again."""
    hardware = device(config.plan.device)
    whole = exported_bytes(config, folder)
    gather = _gather_seconds(config, hardware, whole)
    fill, travel, way = _ways(config, hardware, whole)
    fill += gather
    bucket = bucket_bytes(config, read_architecture(folder)) / 2 / whole
    seconds = max(fill, travel) + bucket * min(fill, travel)
    note = f"{whole / 1e9:.1f} GB over {way}: gathered and written in {fill:.1f} s, read in {travel:.1f} s"
    if config.placement == "colocated" and config.plan.device != "cpu":
        shard = engine_shard(read_architecture(folder), config.engine.tensor)
        back = 2 * shard.parameters * element_bytes(config) / HOST_LINK
        seconds += back
        note += f"; engines' weights to the host and back {back:.1f} s"
    return Phase(seconds, note)


def _ways(config: RunConfig, hardware: Device, whole: float) -> tuple[float, float, str]:
    """Seconds of writing on rank 0 and of what the engines wait for after that, and the way in words."""
    on_gpu = config.plan.device != "cpu"
    through_host = whole / (HOST_LINK if on_gpu else hardware.link)
    match config.weights.transport:
        case "colocated":
            return through_host, through_host, "the host's memory"
        case "disk":
            return through_host + whole / FILE_SYSTEM, whole / FILE_SYSTEM, "a shared file system"
        case "host_broadcast":
            hops = ceil(log2(1 + config.engine.count * config.engine.tensor))
            return through_host, hops * whole / GLOO, f"gloo in {hops} hops"
        case "broadcast" if places(config).nodes > 1:
            return 0.0, whole / (config.plan.network_gb_per_second * 1e9), "the network"
        case "broadcast":
            return 0.0, whole / hardware.link, "links within the node"


def _gather_seconds(config: RunConfig, hardware: Device, whole: float) -> float:
    """What rank 0 has not of the model comes from the other ranks of its replica, one after another. Experts
    count as if they were there too, although some may come from other replicas.
    """
    parallel = config.trainer.parallel
    owned = whole / (parallel.tensor * parallel.pipeline)
    same_stage = owned * (parallel.tensor - 1)
    others = whole - owned - same_stage
    # Ranks are numbered tensor, data, pipeline: another stage is that far away.
    near = on_one_node(config, parallel.ranks)
    network = config.plan.network_gb_per_second * 1e9
    return same_stage / hardware.link + others / (hardware.link if near else network)
