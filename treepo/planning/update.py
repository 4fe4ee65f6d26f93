"""A weight update on paper: seconds, and what it holds where. Nothing in here was measured on a GPU.

Bucket k + 1 is gathered on rank 0 while bucket k travels and is loaded (docs/weights.md), so the slower of
the two sets the pace, and the other is waited for once. Units: bytes, seconds.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_bridge.architecture import Architecture, read_architecture
from treepo.config.schema import RunConfig
from treepo.planning.engine_shard import EngineShard, engine_shard, padded_vocabulary
from treepo.planning.hardware import Device, device
from treepo.planning.memory import Memory
from treepo.planning.phase import Phase

HOST_LINK = 25e9
"""Bytes a second between a GPU and its host: PCIe 5, pinned, one direction at a time."""
FILE_SYSTEM = 5e9
"""Bytes a second that a shared file system is written at, and read again."""
VALUE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class UpdateMemory:
    """What an update holds on top of everything else: on the trainer's rank 0, on each engine rank, and on
    the host of rank 0.
    """

    trainer: Memory
    engine: Memory
    host: Memory


def model_values(architecture: Architecture) -> int:
    """Numbers in the model's Hugging Face tensors."""
    shard = engine_shard(architecture, tensor=1)
    tables = 1 if architecture.tied else 2
    vocabulary = architecture.dimensions.vocabulary
    missing = padded_vocabulary(vocabulary, 1) - vocabulary
    return shard.parameters - tables * missing * architecture.hidden


def update_memory(config: RunConfig, folder: Path) -> UpdateMemory:
    """Of one update by `weights.transport`."""
    architecture, parallel = read_architecture(folder), config.actor.parallel
    value_bytes = VALUE_BYTES[config.model.dtype]
    bucket = bucket_bytes(config, architecture)
    on_gpu = config.plan.device != "cpu"
    shared = parallel.tensor * parallel.pipeline > 1
    hidden, tables = architecture.hidden, architecture.dimensions.vocabulary * architecture.hidden
    # A joined gate and up projection stands beside its shards; the vocabulary's rows are received in place.
    joined = max(tables if shared else 0, (4 if shared else 2) * hidden * architecture.intermediate)
    on_device = config.weights.transport == "broadcast" or not on_gpu
    two = f"two of at most {bucket / 2**20:.0f} MiB"
    trainer = Memory(
        "trainer, rank 0, in an update",
        {"joined parameter": joined * value_bytes} | ({"buckets": 2.0 * bucket} if on_device else {}),
        {"joined parameter": "the largest, with its shards", "buckets": two},
    )
    engine = Memory("engine, in an update", {"bucket": bucket}, {"bucket": "one, on every rank"})
    host = Memory(
        "host of rank 0, in an update", {} if on_device else {"buckets": 2.0 * bucket}, {"buckets": two}
    )
    return UpdateMemory(trainer, engine, host)


def bucket_bytes(config: RunConfig, architecture: Architecture) -> float:
    """Of the largest bucket: `weights.bucket_mb`, or one tensor that is larger."""
    value_bytes, hidden = VALUE_BYTES[config.model.dtype], architecture.hidden
    widest = max(
        architecture.dimensions.vocabulary,
        architecture.intermediate,
        architecture.heads * architecture.dimensions.head_dim,
    )
    whole = model_values(architecture) * value_bytes
    return max(min(config.weights.bucket_mb << 20, whole), widest * hidden * value_bytes)


def update_seconds(config: RunConfig, folder: Path) -> Phase:
    """From the trainer's last step to engines that serve again."""
    architecture, plan = read_architecture(folder), config.plan
    hardware, network = device(plan.device), plan.network_gb_per_second * 1e9
    whole = model_values(architecture) * VALUE_BYTES[config.model.dtype]
    host_link = HOST_LINK if plan.device != "cpu" else hardware.link
    gather = _gather_seconds(config, hardware, network, whole)
    transport = config.weights.transport
    if transport == "colocated":
        fill, travel, way = gather + whole / host_link, whole / host_link, "the host's memory"
    elif transport == "disk":
        fill, travel, way = gather + whole / FILE_SYSTEM, whole / FILE_SYSTEM, "a shared file system"
    else:
        apart = _nodes(config) > 1
        fill, travel, way = (
            gather,
            whole / (network if apart else hardware.link),
            ("the network" if apart else "links within the node"),
        )
    bucket = bucket_bytes(config, architecture) / whole
    seconds = max(fill, travel) + bucket * min(fill, travel)
    note = f"{whole / 1e9:.1f} GB over {way}: gathered and written in {fill:.1f} s, read in {travel:.1f} s"
    if config.placement == "colocated" and plan.device != "cpu":
        shard: EngineShard = engine_shard(architecture, config.engine.tensor)
        back = 2 * shard.parameters * VALUE_BYTES[config.model.dtype] / HOST_LINK
        seconds += back
        note += f"; engines' weights to the host and back {back:.1f} s"
    return Phase(seconds, note)


def _gather_seconds(config: RunConfig, hardware: Device, network: float, whole: float) -> float:
    """What rank 0 has not of the model comes from the other ranks of its replica, one after another."""
    parallel = config.actor.parallel
    owned = whole / (parallel.tensor * parallel.pipeline)
    same_stage = owned * (parallel.tensor - 1)
    others = whole - owned - same_stage
    # Ranks are numbered tensor, data, pipeline: another stage is that far away.
    near = parallel.ranks <= config.plan.devices_per_node
    return same_stage / hardware.link + others / (hardware.link if near else network)


def _nodes(config: RunConfig) -> int:
    """That trainer and engines are on."""
    ranks = config.actor.parallel.ranks
    devices = ranks if config.placement == "colocated" else ranks + config.engine.count * config.engine.tensor
    return -(-devices // config.plan.devices_per_node)


def update_problem(config: RunConfig) -> str | None:
    """Why weights cannot go the configured way, in one line; None where they can."""
    nodes = _nodes(config)
    if config.weights.transport == "colocated" and nodes > 1:
        return (
            f"weights.transport = colocated needs trainer and engines on one machine; these are on {nodes} "
            f"nodes of {config.plan.devices_per_node} devices (broadcast and disk are allowed)"
        )
    if (
        config.weights.transport == "broadcast"
        and config.placement == "colocated"
        and config.plan.device != "cpu"
    ):
        return (
            "weights.transport = broadcast with placement = colocated: NCCL takes one process a GPU "
            "(colocated and disk are allowed)"
        )
    return None
