"""Seconds of a training step, from stated rates: nothing in here was measured on a GPU.

Matrix products run at `hardware.Device.efficiency` of the peak. A forward pass is counted once for scoring
(once more for a reference), three times for training (a backward pass takes two), and once more where
everything is recomputed. Added: the pipeline's idle moments (stages - 1, divided by the chunks of each, of
one micro-batch); what tensor-parallel ranks send (two gathers and two scatters of the hidden states a layer)
and experts' ranks (there and back), forward and as much again backward, none of it hidden; gradients and
parameters among replicas, and the optimizer's passes over its state. Left out: what goes between stages,
grading (it runs while sampling does), checkpoints.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_bridge.architecture import Architecture, read_architecture
from treepo.config.run import RunConfig
from treepo.planning.engine_shard import engine_shard
from treepo.planning.flops import forward_flops
from treepo.planning.hardware import device
from treepo.planning.memory import element_bytes
from treepo.planning.packed_step import ReplicaWork, replica_work
from treepo.planning.phase import Phase
from treepo.planning.places import on_one_node
from treepo.planning.sampling import Sampling
from treepo.planning.update_time import update_seconds

_OPTIMIZER_BYTES = 30
"""That Adam reads and writes of a parameter: gradient, master weight and two moments in float32, there and
back, and the parameter.
"""


@dataclass(frozen=True, slots=True)
class StepTime:
    """phases: by name, in their order. leaf_tokens: of all responses of the step, a shared token for each."""

    phases: Mapping[str, Phase]
    leaf_tokens: float

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases.values())

    @property
    def tokens_per_second(self) -> float:
        return self.leaf_tokens / self.seconds


def step_time(config: RunConfig, folder: Path, sampling: Sampling) -> StepTime:
    """Of a step that samples `sampling`."""
    architecture = read_architecture(folder)
    work = replica_work(config, sampling.trees)
    rate = sampling.decoded_tokens / sampling.seconds
    return StepTime(
        {
            "sample": Phase(
                sampling.seconds,
                f"{sampling.decoded_tokens:,.0f} tokens at {rate:,.0f} a second; {sampling.mean_batch:.0f} "
                "requests in an engine's decoding step",
            ),
            "score": _passes(config, architecture, work, _scored(config), sends=_scored(config)),
            "train": _passes(config, architecture, work, *_trained(config, architecture, work)),
            "optimizer": _optimizer(config, architecture),
            "update": update_seconds(config, folder),
        },
        sampling.leaf_tokens,
    )


def _scored(config: RunConfig) -> int:
    """Forward passes before training."""
    return 2 if config.learning.kl_coefficient else 1


def _trained(config: RunConfig, architecture: Architecture, work: list[ReplicaWork]) -> tuple[float, int]:
    """Training in forward passes: of computing, of sending."""
    if config.trainer.recompute == "full":
        return 4.0, 3
    if config.trainer.recompute == "none":
        return 3.0, 2
    tokens, pairs = sum(one.total_tokens for one in work), sum(one.total_pairs for one in work)
    attention = forward_flops(architecture, 0, pairs) / forward_flops(architecture, tokens, pairs)
    return 3.0 + attention, 2


def _passes(
    config: RunConfig, architecture: Architecture, work: list[ReplicaWork], passes: float, sends: int
) -> Phase:
    """So many forward passes over the step's packs, by the slowest replica."""
    trainer, hardware = config.trainer, device(config.plan.device)
    parallel, mini_batches = trainer.parallel, config.learning.mini_batches
    ranks = parallel.tensor * parallel.pipeline
    slowest = max(work, key=lambda one: forward_flops(architecture, one.total_tokens, one.total_pairs))
    flops = forward_flops(architecture, slowest.total_tokens, slowest.total_pairs)
    computing = passes * flops / (ranks * hardware.flops * hardware.efficiency)
    sending = sends * slowest.total_tokens * _sent_seconds(config, architecture) / parallel.pipeline
    idle = (parallel.pipeline - 1) / parallel.virtual_pipeline / slowest.micro_batches
    seconds = mini_batches * (computing + sending) * (1 + idle)
    tokens = mini_batches * slowest.total_tokens
    note = (
        f"{passes:g} x {mini_batches * flops:.2e} flops for {tokens:,.0f} packed tokens of a replica, on "
        f"{ranks} devices at {hardware.efficiency:.0%} of {hardware.flops / 1e12:.0f} Tflop/s"
    )
    if sending:
        note += f"; {mini_batches * sending:.1f} s sending"
    if idle:
        note += f"; {idle:.0%} idle, {slowest.micro_batches:.0f} micro-batches in {parallel.pipeline} stages"
    return Phase(seconds, note)


def _sent_seconds(config: RunConfig, architecture: Architecture) -> float:
    """What one token costs to send in one forward pass of all layers."""
    parallel, plan, hardware = config.trainer.parallel, config.plan, device(config.plan.device)
    values = element_bytes(config) * architecture.hidden
    tensor = 4 * (parallel.tensor - 1) / parallel.tensor * values * architecture.dimensions.layers
    seconds = tensor / hardware.link
    if architecture.experts is not None and parallel.expert > 1:
        near = on_one_node(config, parallel.expert)
        away = (parallel.expert - 1) / parallel.expert * architecture.experts.per_token
        sparse = len(architecture.dimensions.sparse_layers)
        rate = hardware.link if near else plan.network_gb_per_second * 1e9
        seconds += 2 * away * values * sparse / parallel.tensor / rate
    return seconds


def _optimizer(config: RunConfig, architecture: Architecture) -> Phase:
    """Gradients to the ranks that own them, Adam, parameters back; once a mini-batch."""
    parallel, plan, hardware = config.trainer.parallel, config.plan, device(config.plan.device)
    shard, steps = engine_shard(architecture, 1), config.learning.mini_batches
    dense = (shard.parameters - shard.experts) / (parallel.tensor * parallel.pipeline)
    experts = shard.experts / (parallel.expert * parallel.pipeline)
    owners, expert_owners = parallel.data, parallel.tensor * parallel.data / parallel.expert
    sent = dense * (owners - 1) / owners + experts * (expert_owners - 1) / expert_owners
    near = on_one_node(config, parallel.tensor * parallel.data)
    rate = hardware.link if near else plan.network_gb_per_second * 1e9
    sending = steps * sent * (4 + element_bytes(config)) / rate
    owned = dense / owners + experts / expert_owners
    updating = steps * owned * _OPTIMIZER_BYTES / (hardware.memory_bandwidth * hardware.memory_efficiency)
    note = (
        f"{steps} x {dense + experts:.2e} parameters: gradients in float32 and parameters back over "
        f"{rate / 1e9:.0f} GB/s, {sending:.1f} s; Adam {updating:.1f} s"
    )
    return Phase(sending + updating, note)
