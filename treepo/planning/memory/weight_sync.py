"""Bytes of a weight sync: the tensor being joined on trainer rank 0, the buckets, and the whole model.

Rank 0 receives a parameter's shards, one parameter at a time, joins them, and copies the tensors into a
bucket while the previous bucket travels (`megatron_bridge.weight_transfer`, `treepo.weight_sync`).
"""

from pathlib import Path

from megatron_bridge.architecture import Architecture, tensor_shapes
from megatron_bridge.hf_weight_map import expand
from megatron_bridge.layout_shards import Shard
from megatron_bridge.peft_folder import adapter_shapes
from megatron_bridge.tensor_surgery import QKV, VOCABULARY
from treepo.config.run import RunConfig
from treepo.planning.architecture import planned_architecture
from treepo.planning.memory.adapters import MERGING, largest_merged
from treepo.planning.memory.parts import Memory, Parts, element_bytes, model_dtype
from treepo.weight_sync.wire import TensorInfo, plan_buckets


def sync_memory(
    config: RunConfig, architecture: Architecture, shards: tuple[Shard, ...], held: Parts
) -> Memory:
    """Rank 0 during a sync. held: what it holds throughout."""
    joined = _joined_bytes(config, architecture, shards)
    if config.served_lora is not None:
        joined = 2.0 * max(tensor.nbytes for tensor in sent_tensors(config, architecture))
    parts = {**held, "joined tensor": (joined, "the largest parameter's shards and the tensors made of them")}
    if (lora := config.trainer.lora) is not None and config.served_lora is None:
        largest = largest_merged(shards, architecture, lora)
        peak = max(MERGING * largest, element_bytes(config) * largest + joined)
        parts["merging"] = (
            peak - joined,
            "the largest shard and its adapters, in float32, beyond the joined",
        )
    shared = config.weights.transport == "colocated" and config.plan.device != "cpu"
    if shared or config.weights.transport == "broadcast":
        note = f"two of weights.bucket_mb = {config.weights.bucket_mb} MiB, or one tensor"
        parts["weight buckets"] = bucket_bytes(config, architecture), note
    return Memory("trainer, rank 0 in a weight sync", parts)


def _joined_bytes(config: RunConfig, architecture: Architecture, shards: tuple[Shard, ...]) -> float:
    """The largest sum of shards that came from other ranks and the tensors joined from them.

    The vocabulary's shards are received into one tensor. Query, key and value are taken apart after joining.
    """
    ranks, largest = config.trainer.parallel.tensor, 0.0
    surgeries = {
        rule.parameter: rule.surgery for rule in expand(architecture.family.rules, architecture.dimensions)
    }
    for shard in shards:
        for each in shard.parameters:
            pieces = 1 if each.expert else ranks
            surgery = surgeries[each.name]
            elsewhere = shard.stage > 0 or (each.expert and config.trainer.parallel.expert > 1)
            foreign = (pieces if elsewhere else pieces - 1) / pieces
            if surgery.replicated or surgery is VOCABULARY:
                copies = float(foreign > 0)
            else:
                copies = foreign + (2 if surgery is QKV else 1)
            largest = max(largest, each.elements * pieces * copies)
    return largest * element_bytes(config)


def bucket_bytes(config: RunConfig, architecture: Architecture) -> float:
    """Both buffers in which buckets are filled and sent in turn; each is as large as its largest bucket."""
    buckets = plan_buckets(sent_tensors(config, architecture), config.weights.bucket_mb << 20)
    sizes = [sum(tensor.nbytes for tensor in bucket) for bucket in buckets]
    return max(sizes[0::2]) + max(sizes[1::2], default=0)


def exported_bytes(config: RunConfig, folder: Path) -> int:
    """A Hugging Face folder of the weights."""
    shapes = tensor_shapes(planned_architecture(folder))
    return sum(TensorInfo(name, model_dtype(config), shape).nbytes for name, shape in shapes.items())


def sent_bytes(config: RunConfig, folder: Path) -> int:
    """What a sync sends: the same, or the adapters alone."""
    return sum(tensor.nbytes for tensor in sent_tensors(config, planned_architecture(folder)))


def sent_tensors(config: RunConfig, architecture: Architecture) -> tuple[TensorInfo, ...]:
    """The manifest of a sync."""
    lora = config.served_lora
    shapes = tensor_shapes(architecture) if lora is None else adapter_shapes(architecture, lora)
    return tuple(TensorInfo(name, model_dtype(config), shape) for name, shape in shapes.items())
