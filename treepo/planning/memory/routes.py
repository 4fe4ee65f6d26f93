"""Routes that are replayed (`trainer.routing_replay`), wherever they are kept. Units: bytes.

With `rollout`, an engine keeps the experts of every token of its KV cache on the host; trees hold those of
their own tokens, and packs copies of them. With either mode a rank's device has the routes of its own layers
for all packs of a step.
"""

from pathlib import Path

import numpy as np

from megatron_bridge.architecture import Architecture
from treepo.config.run import RunConfig
from treepo.planning.architecture import planned_architecture
from treepo.planning.memory.activations import MicroBatch
from treepo.planning.memory.engine import EngineMemory
from treepo.planning.memory.parts import Parts
from treepo.planning.simulation.workload import workload
from treepo.routes import dtype_for

_OF_ENGINE = 4
"""SGLang 0.5.16 keeps an expert as int32."""
_COPIES_OF_PACKS = 2
"""The driver's, and Ray's for the ranks of its node."""


def on_device(batch: MicroBatch, layers: int) -> float:
    """A micro-batch's, in a rank's `layers` with experts."""
    if batch.trainer.routing_replay == "none":
        return 0.0
    return batch.own_tokens * layers * _per_layer(batch.architecture)


def on_host(config: RunConfig, folder: Path, engine: EngineMemory, ranks: int) -> Parts:
    """Those of trees and packs, and of the KV caches of `ranks` engine ranks; empty unless engines return
    routes.
    """
    if config.trainer.routing_replay != "rollout":
        return {}
    architecture = planned_architecture(folder)
    layers, load, prompts = architecture.dimensions.layers, workload(config), config.data.prompts_per_step
    packed = prompts * engine.expected_tree
    if config.learning.packing == "flat":
        packed = prompts * config.sampling.most_leaves * (load.prompt_tokens + load.lengths.mean)
    tokens = config.max_untrained * engine.expected_tree + _COPIES_OF_PACKS * packed
    token, cached = layers * _per_layer(architecture), ranks * engine.kv_tokens
    slot = layers * _per_token(architecture) * _OF_ENGINE
    return {
        "routes of trees and packs": (tokens * token, f"{tokens:,.0f} tokens x {token:,} bytes"),
        "engines' routes": (cached * slot, f"{cached:,} KV tokens x {slot:,} bytes"),
    }


def _per_layer(architecture: Architecture) -> int:
    return _per_token(architecture) * np.dtype(dtype_for(architecture.dimensions.experts)).itemsize


def _per_token(architecture: Architecture) -> int:
    assert architecture.experts is not None, "a model without experts has no routes"
    return architecture.experts.per_token
