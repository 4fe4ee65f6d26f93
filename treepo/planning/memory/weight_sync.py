"""Bytes of a weight sync: the tensor being joined on a sending rank, its buckets, and the whole model.

A source receives a parameter's shards, one parameter at a time, joins them, and copies the tensors into a
bucket while the previous bucket travels (`megatron_bridge.weight_source`, `treepo.weight_sync`). Rank 0 is
always one of the sources.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_bridge.adapter_names import adapter_rules
from megatron_bridge.architecture import Architecture, tensor_shapes
from megatron_bridge.hf_weight_map import expand
from megatron_bridge.layout_shards import Shard, ShardParameter
from megatron_bridge.peft_folder import adapter_shapes
from megatron_bridge.tensor_surgery import QKV, VOCABULARY
from treepo.config.run import RunConfig
from treepo.planning.architecture import planned_architecture
from treepo.planning.memory.adapters import MERGING, adapted_parameters
from treepo.planning.memory.parts import Memory, Parts, element_bytes, model_dtype
from treepo.planning.nodes import ranks_per_node
from treepo.weight_sync.lanes import by_size, deal, lane_bucket, lanes_of, on_one_host, source_ranks
from treepo.weight_sync.wire import TensorInfo, plan_buckets


def sync_memory(
    config: RunConfig, architecture: Architecture, shards: tuple[Shard, ...], held: Parts
) -> Memory:
    """Rank 0 during a sync. held: what it holds throughout."""
    per_parameter = list(_joined_bytes(config, architecture, shards))
    joined = max(nbytes for _, nbytes in per_parameter)
    if config.served_lora is not None:
        joined = 2.0 * max(tensor.nbytes for tensor in sent_tensors(config, architecture))
    parts = {**held, "joined tensor": (joined, "the largest parameter's shards and the tensors made of them")}
    if (lora := config.trainer.lora) is not None and config.served_lora is None:
        adapted = adapted_parameters(architecture, lora)
        merged = [(each.elements, nbytes) for each, nbytes in per_parameter if each.name in adapted]
        peaks = (max(MERGING * values, element_bytes(config) * values + nbytes) for values, nbytes in merged)
        parts["merging"] = (
            max(max(peaks) - joined, 0.0),
            "a shard and its adapters, in float32, beyond the joined",
        )
    shared = config.weights.transport == "colocated" and config.plan.device != "cpu"
    if shared or config.weights.transport == "broadcast":
        part = f", shared by {count} lanes" if (count := sources(config)) > 1 else ""
        note = f"two of weights.bucket_mb = {config.weights.bucket_mb} MiB{part}, or one parameter"
        parts["weight buckets"] = bucket_bytes(config, architecture)[0], note
    return Memory("trainer, rank 0 in a weight sync", parts)


def sources(config: RunConfig) -> int:
    """The number of trainer ranks that send."""
    ranks = config.trainer.parallel.ranks
    able = ranks_per_node(config, ranks) if on_one_host(config.weights) else ranks
    return len(source_ranks(range(able), lanes_of(config.weights)))


def _sending_stages(config: RunConfig) -> dict[int, set[int]]:
    """The pipeline stages that have sources, and the parts of the experts that these hold."""
    parallel = config.trainer.parallel
    stages: dict[int, set[int]] = {}
    for rank in source_ranks(range(parallel.ranks), sources(config)):
        stage, number = divmod(rank, parallel.stage_ranks)
        stages.setdefault(stage, set()).add(number % parallel.expert)
    return stages


def _joined_bytes(
    config: RunConfig, architecture: Architecture, shards: tuple[Shard, ...]
) -> Iterator[tuple[ShardParameter, float]]:
    """Of each parameter: the sum of shards that came from other ranks and the tensors joined from them.

    The vocabulary's shards are received into one tensor. Query, key and value are taken apart after joining.
    """
    parallel, sending = config.trainer.parallel, _sending_stages(config)
    surgeries = {
        rule.parameter: rule.surgery for rule in expand(architecture.family.rules, architecture.dimensions)
    }
    for shard in shards:
        experts = sending.get(shard.stage, set())
        for each in shard.parameters:
            pieces = 1 if each.expert else parallel.tensor
            surgery = surgeries[each.name]
            elsewhere = not experts or (each.expert and len(experts) < parallel.expert)
            foreign = (pieces if elsewhere else pieces - 1) / pieces
            if surgery.replicated or surgery is VOCABULARY:
                copies = float(foreign > 0)
            else:
                copies = foreign + (2 if surgery is QKV else 1)
            yield each, each.elements * pieces * copies * element_bytes(config)


@dataclass(frozen=True, slots=True)
class _Parameter:
    nbytes: int


def bucket_bytes(config: RunConfig, architecture: Architecture) -> list[float]:
    """Of each source: both buffers in which buckets are filled and sent in turn; each is as large as its
    largest bucket. The source with the largest parameter is the first.
    """
    lanes = sources(config)
    size = lane_bucket(config.weights, lanes, config.engine.ranks)
    parameters = _parameters(config, architecture)
    chosen = deal([each.nbytes for each in parameters], [range(lanes)] * len(parameters))
    shares: list[list[_Parameter]] = [[] for _ in range(lanes)]
    for index in by_size([each.nbytes for each in parameters]):
        shares[chosen[index]].append(parameters[index])
    return [_two_buffers(plan_buckets(share, size)) for share in shares]


def _two_buffers(buckets: Sequence[Sequence[_Parameter]]) -> float:
    sizes = [sum(each.nbytes for each in bucket) for bucket in buckets]
    return max(sizes[0::2], default=0) + max(sizes[1::2], default=0)


def _parameters(config: RunConfig, architecture: Architecture) -> list[_Parameter]:
    """The bytes of each parameter, whose tensors travel in one bucket."""
    infos = {info.name: info.nbytes for info in sent_tensors(config, architecture)}
    rules = expand(architecture.family.rules, architecture.dimensions)
    if (lora := config.served_lora) is not None:
        rules = adapter_rules(architecture, lora.targets)
    sizes = (sum(infos.get(tensor, 0) for tensor in rule.tensors) for rule in rules)
    return [_Parameter(size) for size in sizes if size]


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
