"""How fast an engine's devices serve a model, from `treepo.planning.hardware`'s rates; not measured on a GPU.

A forward pass takes the longer of reading and computing, plus all-reduces of tensor-parallel ranks, plus a
constant for scheduling, sampling and launching (`Device.pass_seconds`). Pipeline stages work on as many parts
of the requests at once, so all requests have advanced after one pass of each part through the slowest stage,
times the number of stages.

- Read: the weights, of experts those that the tokens are sent to (each to a random choice), and the whole KV
  of every request; a shared prefix is read once for each request, as SGLang's attention kernels do.
- Sent: two all-reduces a layer of the new tokens' hidden states, in a ring; the hidden states to the next
  stage.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_bridge.architecture import Architecture
from treepo.config.run import RunConfig
from treepo.planning.architecture import planned_architecture
from treepo.planning.hardware import Device, device
from treepo.planning.memory.engine import EngineMemory
from treepo.planning.memory.engine_shard import EngineShard
from treepo.planning.memory.parts import element_bytes
from treepo.planning.nodes import engine_link_rate
from treepo.planning.simulation.rates import Prefill
from treepo.planning.speed.flops import forward_flops, logits_flops, pair_flops

_LATENCY = 2e-3  # driver and SGLang's processes between an answer and the next request
_ALL_REDUCE_SECONDS = 10e-6  # launch and synchronisation


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """`Rates` of an engine of `tensor` ranks in each of its stages.

    stages: a rank of each. value_bytes: one weight, or one number in the KV cache. link: bytes per second
    between tensor-parallel ranks. hop: from one stage to the next.
    """

    device: Device
    architecture: Architecture
    stages: tuple[EngineShard, ...]
    tensor: int
    value_bytes: int
    link: float
    hop: float
    latency: float = _LATENCY

    def decode(self, requests: int, kv_tokens: np.ndarray) -> np.ndarray:
        parts = min(len(self.stages), requests)
        flops = forward_flops(self.architecture, requests, 0) + pair_flops(self.architecture) * kv_tokens
        reading = self._weights_seconds(requests / parts) + self._kv_seconds * kv_tokens / parts
        a_pass = np.maximum(reading, flops / parts / self._flops) + self._fixed_seconds(requests / parts)
        return len(self.stages) * a_pass

    def prefill(self, batch: Prefill) -> float:
        parts = len(self.stages)
        without_logits = batch.new - batch.requests
        flops = forward_flops(self.architecture, batch.new, batch.pairs)
        flops -= without_logits * logits_flops(self.architecture)
        reading = self._weights_seconds(batch.new / parts) + batch.context * self._kv_seconds / parts
        return parts * (max(reading, flops / parts / self._flops) + self._fixed_seconds(batch.new / parts))

    @property
    def _flops(self) -> float:
        """Operations per second of all ranks."""
        return self.device.flops * self.device.efficiency * self.tensor * len(self.stages)

    @property
    def _bandwidth(self) -> float:
        """Bytes per second of each rank."""
        return self.device.memory_bandwidth * self.device.memory_efficiency

    @property
    def _kv_seconds(self) -> float:
        """A stage's, to read one token's KV."""
        return max(shard.kv_values for shard in self.stages) * self.value_bytes / self._bandwidth

    def _weights_seconds(self, tokens: float) -> float:
        """A stage's, to read the weights for `tokens` new tokens."""
        touched = 1.0
        if self.architecture.experts is not None:
            chance = self.architecture.experts.per_token / self.architecture.dimensions.experts
            touched = 1 - (1 - chance) ** tokens
        read = max(shard.layers + self._output(shard) + shard.experts * touched for shard in self.stages)
        return read * self.value_bytes / self._bandwidth

    def _output(self, shard: EngineShard) -> int:
        """Of an embedding that is not the output, only rows are read."""
        return shard.output or (shard.embedding if len(self.stages) == 1 else 0)

    def _fixed_seconds(self, tokens: float) -> float:
        """A stage's constant, all-reduces and message to the next stage."""
        seconds, hidden = self.device.pass_seconds, tokens * self.architecture.hidden * self.value_bytes
        if len(self.stages) > 1:
            seconds += hidden / self.hop
        if self.tensor > 1:
            rounds = 2 * self.architecture.dimensions.layers / len(self.stages)
            sent = 2 * (self.tensor - 1) / self.tensor * hidden
            seconds += rounds * (_ALL_REDUCE_SECONDS + sent / self.link)
        return seconds


def planned_rates(config: RunConfig, folder: Path, engine: EngineMemory) -> DeviceRates:
    """Of one engine that serves the model in `folder`."""
    return DeviceRates(
        device(config.plan.device),
        planned_architecture(folder),
        engine.stages,
        config.engine.tensor,
        element_bytes(config),
        link=engine_link_rate(config, config.engine.tensor),
        hop=engine_link_rate(config, config.engine.ranks),
    )
