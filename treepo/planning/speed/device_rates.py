"""How fast an engine's devices serve a model, from `treepo.planning.hardware`'s rates; not measured on a GPU.

A forward pass takes the longer of reading and computing, plus all-reduces of tensor-parallel ranks, plus a
constant for scheduling, sampling and launching (`Device.pass_seconds`).

- Read: the weights, of experts those that the tokens are sent to (each to a random choice), and the whole KV
  of every request; a shared prefix is read once for each request, as SGLang's attention kernels do.
- Sent: two all-reduces a layer of the new tokens' hidden states, in a ring.
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
from treepo.planning.simulation.rates import Prefill
from treepo.planning.speed.flops import forward_flops, logits_flops, pair_flops

_LATENCY = 2e-3  # driver and SGLang's processes between an answer and the next request
_ALL_REDUCE_SECONDS = 10e-6  # launch and synchronisation


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """`Rates` of an engine of `tensor` ranks. value_bytes: one weight, or one number in the KV cache."""

    device: Device
    architecture: Architecture
    shard: EngineShard
    tensor: int
    value_bytes: int
    latency: float = _LATENCY

    def decode(self, requests: int, kv_tokens: np.ndarray) -> np.ndarray:
        flops = forward_flops(self.architecture, requests, 0) + pair_flops(self.architecture) * kv_tokens
        reading = self._weights_seconds(requests) + self._kv_seconds * kv_tokens
        return np.maximum(reading, flops / self._flops) + self._fixed_seconds(requests)

    def prefill(self, batch: Prefill) -> float:
        without_logits = batch.new - batch.requests
        flops = forward_flops(self.architecture, batch.new, batch.pairs)
        flops -= without_logits * logits_flops(self.architecture)
        reading = self._weights_seconds(batch.new) + batch.context * self._kv_seconds
        return max(reading, flops / self._flops) + self._fixed_seconds(batch.new)

    @property
    def _flops(self) -> float:
        """Operations per second of all ranks."""
        return self.device.flops * self.device.efficiency * self.tensor

    @property
    def _bandwidth(self) -> float:
        """Bytes per second of each rank."""
        return self.device.memory_bandwidth * self.device.memory_efficiency

    @property
    def _kv_seconds(self) -> float:
        """To read one token's KV."""
        return self.shard.kv_values * self.value_bytes / self._bandwidth

    def _weights_seconds(self, tokens: int) -> float:
        """To read the weights for `tokens` new tokens; of an embedding that is not the output, only rows."""
        shard = self.shard
        read = shard.layers + (shard.output or shard.embedding)
        if self.architecture.experts is not None:
            chance = self.architecture.experts.per_token / self.architecture.dimensions.experts
            read += shard.experts * (1 - (1 - chance) ** tokens)
        return read * self.value_bytes / self._bandwidth

    def _fixed_seconds(self, tokens: int) -> float:
        """The constant and the all-reduces."""
        if self.tensor == 1:
            return self.device.pass_seconds
        rounds = 2 * self.architecture.dimensions.layers
        sent = 2 * (self.tensor - 1) / self.tensor * tokens * self.architecture.hidden * self.value_bytes
        return self.device.pass_seconds + rounds * (_ALL_REDUCE_SECONDS + sent / self.device.link)


def planned_rates(config: RunConfig, folder: Path, engine: EngineMemory) -> DeviceRates:
    """Of one engine that serves the model in `folder`."""
    return DeviceRates(
        device(config.plan.device),
        planned_architecture(folder),
        engine.shard,
        config.engine.tensor,
        element_bytes(config),
    )
