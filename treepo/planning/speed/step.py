"""Seconds of a training step, phase by phase, from stated rates (`treepo.planning.hardware`).

No phase was compared with a GPU. Counted are:

- Passes over the packs, with matrix products at `Device.efficiency` of the peak. Log-probs take one forward
  pass, two with a reference. Training takes three (a backward pass counts twice), four if it recomputes all.
  Beside frozen weights (`trainer.lora`) a backward pass counts once, and the adapters' own products not.
- The pipeline's idle time: (stages - 1) / (chunks of each) of one micro-batch.
- Traffic of tensor-parallel ranks (two gathers and two scatters of the hidden states a layer) and of experts'
  ranks (there and back), once forward and once backward, none of it hidden. Likewise the keys and values that
  context-parallel ranks gather in each layer, again with recomputation, and their gradients; attention hides
  up to half of these.
- Of a context group's ranks, the one whose slices have the most pairs.
- Gradients and parameters between replicas, and the optimizer's passes over its state.
- If the run is asynchronous or oversamples, what overlaps (`speed/loop.py`).
- The weight sync. Sources gather bucket k + 1 while bucket k travels and is loaded (docs/weights.md), so the
  slower side sets the pace, and the faster one is waited for once. Lanes count as equal.

Left out: traffic between pipeline stages, grading (it runs during sampling), checkpoints.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log2
from pathlib import Path
from statistics import fmean

from megatron_bridge.architecture import Architecture
from treepo.config.engine import EngineConfig
from treepo.config.run import RunConfig
from treepo.planning.architecture import planned_architecture
from treepo.planning.hardware import FILE_SYSTEM, FROM_HOST, GLOO, TO_HOST, device
from treepo.planning.memory.adapters import adapter_count
from treepo.planning.memory.engine_shard import engine_shards
from treepo.planning.memory.parts import element_bytes
from treepo.planning.memory.trainer import offloaded_bytes
from treepo.planning.memory.weight_sync import bucket_bytes, sent_bytes, sources
from treepo.planning.nodes import footprint, link_rate, shares_devices
from treepo.planning.simulation.loop import LoopTime
from treepo.planning.speed.flops import forward_flops
from treepo.planning.speed.packs import ReplicaWork, replica_work
from treepo.planning.speed.sampling import Sampling
from treepo.tree import Tree

_OPTIMIZER_BYTES = 30
"""Adam's traffic a parameter: gradient, master weight, averages (float32, both ways), the parameter."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Part of a step. note: the arithmetic in words."""

    seconds: float
    note: str


LEARNING = ("log_probs", "train", "optimizer")
"""The phases in which the trainer computes."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """phases: by name, in their order. leaf_tokens: all responses of the step with their shared tokens.

    seconds: of a step, whose phases come one after another or overlap. computing: of these, seconds in which
    an engine computes.
    """

    phases: Mapping[str, Phase]
    leaf_tokens: float
    seconds: float
    computing: float

    @property
    def tokens_per_second(self) -> float:
        return self.leaf_tokens / self.seconds

    @property
    def engines_idle(self) -> float:
        """Share of time in which an engine computes nothing, weight syncs included."""
        return 1 - self.computing / self.seconds

    @property
    def trainer_idle(self) -> float:
        """Share of time in which the trainer computes nothing, weight syncs included."""
        return 1 - sum(self.phases[name].seconds for name in LEARNING) / self.seconds


def step_time(phases: Mapping[str, Phase], sampling: Sampling, loop: LoopTime | None = None) -> StepTime:
    """A step with this sampling and these further phases. loop: several steps together, if they overlap."""
    rate = sampling.decoded_tokens / sampling.seconds
    note = f"{sampling.decoded_tokens:,.0f} tokens"
    if loop is None:
        note += f" at {rate:,.0f} a second; {sampling.mean_batch:.0f} requests in an engine's decoding step"
        seconds, computing = sampling.seconds, sampling.seconds * sampling.busy
        total = seconds + sum(phase.seconds for phase in phases.values())
    else:
        note += f"; {sampling.seconds:,.1f} s if all begin at once and nothing else happens"
        seconds = computing = loop.sampling
        total = loop.seconds
    return StepTime({"sample": Phase(seconds, note), **phases}, sampling.leaf_tokens, total, computing)


def trainer_phases(config: RunConfig, folder: Path, trees: Sequence[Tree]) -> Mapping[str, Phase]:
    """What follows sampling, in a step of such trees of the model in `folder`."""
    architecture = planned_architecture(folder)
    work = _slowest(architecture, replica_work(config, trees))
    forward = 2 if config.learning.kl_coefficient else 1
    return {
        "log_probs": _passes(config, architecture, work, forward, sends=forward, gathers=forward),
        "train": _passes(config, architecture, work, *_training_passes(config, architecture, work)),
        "optimizer": _optimizer(config, architecture),
        "weight_sync": sync_weights(config, folder),
    }


def _slowest(architecture: Architecture, works: Sequence[Sequence[ReplicaWork]]) -> ReplicaWork:
    """The slowest replica's part of a mini-batch, as a mean over mini-batches."""
    slowest = [
        max(work, key=lambda one: forward_flops(architecture, one.tokens, one.pairs)) for work in works
    ]
    return ReplicaWork(
        micro_batches=fmean(one.micro_batches for one in slowest),
        tokens=fmean(one.tokens for one in slowest),
        pairs=fmean(one.pairs for one in slowest),
        fullest=fmean(one.fullest for one in slowest),
    )


def _training_passes(
    config: RunConfig, architecture: Architecture, work: ReplicaWork
) -> tuple[float, int, int]:
    """Training's computation, its traffic, and its gathers of keys and values, each in forward passes. Frozen
    weights have no gradient, so their matrices take one pass less.
    """
    pairs = forward_flops(architecture, 0, work.pairs)
    attention = pairs / forward_flops(architecture, work.tokens, work.pairs)
    passes = 3.0 if config.trainer.lora is None else 2.0 + attention
    if config.trainer.recompute == "full":
        return passes + 1.0, 3, 3
    if config.trainer.recompute == "none":
        return passes, 2, 2
    return passes + attention, 2, 3


def _passes(
    config: RunConfig, architecture: Architecture, work: ReplicaWork, passes: float, sends: int, gathers: int
) -> Phase:
    """`passes` forward passes over the step's packs by the slowest replica, `sends` of them with traffic, and
    `gathers` with that of keys and values.
    """
    hardware, mini_batches = device(config.plan.device), config.learning.mini_batches
    parallel = config.trainer.parallel
    ranks = parallel.replica_ranks * parallel.pipeline
    flops = forward_flops(architecture, work.tokens, work.fullest * work.pairs)
    computing = passes * flops / (ranks * hardware.flops * hardware.efficiency)
    token = sends * _sending_seconds(config, architecture) / parallel.context
    sent = work.tokens * _gathered_bytes(config, architecture)
    token += gathers * _gathered_bytes(config, architecture) / link_rate(config, parallel.replica_ranks)
    sending = work.tokens * token / parallel.pipeline
    idle = (parallel.pipeline - 1) / parallel.virtual_pipeline / work.micro_batches
    seconds = mini_batches * (computing + sending) * (1 + idle)
    tokens = mini_batches * work.tokens
    note = (
        f"{passes:g} x {mini_batches * flops:.2e} FLOP for {tokens:,.0f} packed tokens of a replica, on "
        f"{ranks} devices at {hardware.efficiency:.0%} of {hardware.flops / 1e12:.0f} TFLOP/s"
    )
    if sending:
        note += f"; {mini_batches * sending:.1f} s sending"
    if sent:
        exchanged = mini_batches * gathers * sent / parallel.pipeline
        note += (
            f", with {exchanged / 1e9:,.0f} GB of keys and values to each rank; the slice with the most "
            f"pairs has {work.fullest:.2f} x the mean"
        )
    if idle:
        note += f"; {idle:.0%} idle, {work.micro_batches:.0f} micro-batches in {parallel.pipeline} stages"
    return Phase(seconds, note)


def _gathered_bytes(config: RunConfig, architecture: Architecture) -> float:
    """Keys and values of one token in all layers that a rank gets from its context group, on average."""
    parallel, dimensions = config.trainer.parallel, architecture.dimensions
    values = 2 * dimensions.groups * dimensions.head_dim / parallel.tensor * dimensions.layers
    return (parallel.context - 1) / parallel.context * values * element_bytes(config)


def _sending_seconds(config: RunConfig, architecture: Architecture) -> float:
    """Traffic of one token in one forward pass of all layers."""
    parallel = config.trainer.parallel
    values = element_bytes(config) * architecture.hidden
    tensor = 4 * (parallel.tensor - 1) / parallel.tensor * values * architecture.dimensions.layers
    seconds = tensor / device(config.plan.device).link
    if architecture.experts is not None and parallel.expert > 1:
        away = (parallel.expert - 1) / parallel.expert * architecture.experts.per_token
        sparse = len(architecture.dimensions.sparse_layers)
        seconds += 2 * away * values * sparse / parallel.tensor / link_rate(config, parallel.expert)
    return seconds


def _optimizer(config: RunConfig, architecture: Architecture) -> Phase:
    """Gradients to the ranks that own them, Adam, parameters back; once a mini-batch."""
    parallel, hardware = config.trainer.parallel, device(config.plan.device)
    (shard,), steps = engine_shards(architecture, EngineConfig()), config.learning.mini_batches
    dense = (shard.parameters - shard.experts) / (parallel.tensor * parallel.pipeline)
    experts = shard.experts / (parallel.expert * parallel.pipeline)
    if config.trainer.lora is not None:  # tensor-parallel ranks divide about half of their values
        dense = adapter_count(architecture, config.trainer.lora, expert=False) / parallel.pipeline
        experts = adapter_count(architecture, config.trainer.lora, expert=True)
        experts /= parallel.expert * parallel.pipeline
    owners, expert_owners = parallel.data * parallel.context, parallel.stage_ranks / parallel.expert
    sent = dense * (owners - 1) / owners + experts * (expert_owners - 1) / expert_owners
    rate = link_rate(config, parallel.stage_ranks)
    sending = steps * sent * (4 + element_bytes(config)) / rate
    owned = dense / owners + experts / expert_owners
    updating = steps * owned * _OPTIMIZER_BYTES / (hardware.memory_bandwidth * hardware.memory_efficiency)
    note = (
        f"{steps} x {dense + experts:.2e} parameters: gradients in float32 and parameters back over "
        f"{rate / 1e9:.0f} GB/s, {sending:.1f} s; Adam {updating:.1f} s"
    )
    return Phase(sending + updating, note)


def sync_weights(config: RunConfig, folder: Path) -> Phase:
    """From the last optimizer step to engines that serve again."""
    whole = sent_bytes(config, folder)
    send, load, way = _send_and_load(config, whole)
    send += _gather_seconds(config, whole)
    bucket = sum(bucket_bytes(config, planned_architecture(folder))) / 2 / whole
    seconds = max(send, load) + bucket * min(send, load)
    senders = "rank 0" if (count := sources(config)) == 1 else f"{count} ranks"
    bytes_and_way = f"{whole / 1e9:.1f} GB from {senders} over {way}"
    note = f"{bytes_and_way}: gathered and written in {send:.1f} s, read in {load:.1f} s"
    if shares_devices(config):
        shards = engine_shards(planned_architecture(folder), config.engine)
        # SGLang offloads to pinned memory.
        pinned = device(config.plan.device).pinned
        moved = 2 * max(shard.parameters for shard in shards) * element_bytes(config) / pinned
        note += f"; engines' weights to the host and back {moved:.1f} s"
        offloaded = 2 * offloaded_bytes(config, folder) / pinned
        if offloaded:
            note += f", what trainer.offload moves {offloaded:.1f} s"
        seconds += moved + offloaded
    if config.weights.delta:
        note += "; all of it: what weights.delta saves depends on how much a step changes"
    return Phase(seconds, note)


def _send_and_load(config: RunConfig, whole: float) -> tuple[float, float, str]:
    """Seconds on each source, seconds on the engines after that, and the way in words.

    `colocated` on GPUs: every engine rank reads all bytes, from each source's device its lane; the devices
    serve those of other devices over one link each. A broadcast carries to a rank of an engine its part of
    the bytes; experts and replicated tensors count as if they were divided too. Buckets on the host are in
    pageable memory.
    """
    link = device(config.plan.device).link
    on_gpu = config.plan.device != "cpu"
    lane = whole / sources(config)
    slowest = max(lane, whole / config.engine.ranks)  # over the link of a source, and of an engine rank
    to_host, from_host = whole / (TO_HOST if on_gpu else link), whole / (FROM_HOST if on_gpu else link)
    match config.weights.transport:
        case "colocated" if on_gpu:
            elsewhere = config.engine.count * config.engine.ranks - 1
            copied = 2 * whole / device(config.plan.device).memory_bandwidth  # read and written
            reading = max(elsewhere * lane, whole if elsewhere else 0.0) / link
            return copied * lane / whole, max(copied, reading), "CUDA IPC"
        case "colocated":
            return to_host, from_host, "the host's memory"
        case "disk":
            return to_host + whole / FILE_SYSTEM, whole / FILE_SYSTEM, "a shared file system"
        case "host_broadcast":
            hops = ceil(log2(1 + config.engine.count))  # of a group: a rank of each engine
            return to_host * lane / whole, hops * slowest / GLOO, f"gloo in {hops} hops"
        case "broadcast" if footprint(config).nodes > 1:
            return 0.0, slowest / (config.plan.network_gb_per_second * 1e9), "the network"
        case "broadcast":
            return 0.0, slowest / link, "links within the node"


def _gather_seconds(config: RunConfig, whole: float) -> float:
    """A source receives what it lacks of its lane from the other ranks of its replica, one after another.

    Experts count as if the replica had them all, although some may come from other replicas. A stage has a
    source unless there are more stages than sources.
    """
    parallel, count = config.trainer.parallel, sources(config)
    own_stage = min(count / parallel.pipeline, 1.0)
    same_stage = whole / count * own_stage * (parallel.tensor - 1) / parallel.tensor
    other_stages = whole / count * (1 - own_stage)
    # Ranks are numbered tensor, context, data, pipeline: the last stage is that far away.
    return same_stage / device(config.plan.device).link + other_stages / link_rate(config, parallel.ranks)
