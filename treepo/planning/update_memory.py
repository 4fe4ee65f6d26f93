"""What a weight update takes on the trainer's rank 0: the tensor that is being joined, and two buckets.

From `megatron_bridge.weight_transfer` and `treepo.weight_sync`: rank 0 receives a parameter's shards, one
parameter at a time, joins them, and copies the tensors into a bucket while the one before travels. Units: bytes.
"""

from pathlib import Path

from megatron_bridge.architecture import Architecture, read_architecture
from megatron_bridge.hf_weight_map import expand
from megatron_bridge.layout_shards import Shard, tensor_shapes
from megatron_bridge.tensor_surgery import QKV, VOCABULARY
from treepo.config.run import RunConfig
from treepo.planning.memory import Memory, element_bytes
from treepo.weight_sync.wire import TensorInfo, plan_buckets


def update_memory(
    config: RunConfig, architecture: Architecture, shards: tuple[Shard, ...], held: Memory
) -> Memory:
    """Of rank 0 during an update; `held`: what it holds throughout."""
    parts, notes = dict(held.parts), dict(held.notes)
    parts["joined tensor"] = joined_bytes(config, architecture, shards)
    notes["joined tensor"] = "the largest parameter's shards and what they make together"
    if config.weights.transport == "broadcast":
        parts["weight buckets"] = bucket_bytes(config, architecture)
        notes["weight buckets"] = f"two of weights.bucket_mb = {config.weights.bucket_mb} MiB, or one tensor"
    return Memory("trainer, rank 0 in a weight update", parts, notes)


def joined_bytes(config: RunConfig, architecture: Architecture, shards: tuple[Shard, ...]) -> float:
    """At most: shards that came from other ranks, and the tensors that are joined from them. The vocabulary's
    are received into one tensor; query, key and value are taken apart after they were put together.
    """
    ranks, most = config.trainer.parallel.tensor, 0.0
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
            most = max(most, each.elements * pieces * copies)
    return most * element_bytes(config)


def bucket_bytes(config: RunConfig, architecture: Architecture) -> float:
    """Of the two buffers in which buckets are filled and travel, in turn; each as large as its largest."""
    shapes = tensor_shapes(architecture)
    manifest = tuple(TensorInfo(name, config.model.dtype, shape) for name, shape in shapes.items())
    sizes = [
        sum(tensor.nbytes for tensor in bucket)
        for bucket in plan_buckets(manifest, config.weights.bucket_mb << 20)
    ]
    return max(sizes[0::2]) + max(sizes[1::2], default=0)


def exported_bytes(config: RunConfig, folder: Path) -> int:
    """A Hugging Face folder of the weights: what an update sends, too."""
    return sum(
        TensorInfo(name, config.model.dtype, shape).nbytes
        for name, shape in tensor_shapes(read_architecture(folder)).items()
    )
