"""What one device of an engine holds: weights, KV cache, and how many trees that cache holds in flight."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from megatron_bridge.architecture import read_architecture
from treepo.config.run import RunConfig
from treepo.planning.engine_shard import EngineShard, engine_shard
from treepo.planning.hardware import GIB, device
from treepo.planning.memory import Memory, element_bytes
from treepo.planning.sglang_defaults import defaults, most_requests
from treepo.planning.simulation.lengths import InstantEngine
from treepo.planning.simulation.virtual_clock import run_virtually
from treepo.planning.simulation.workload import Workload, text_of, workload
from treepo.rollout.driver import TreeDriver

_REMEMBERED_TREES = 64  # by which a driver knows how large trees become
_CPU_TOKENS = 1 << 17  # KV cache of an engine on a CPU (sglang_rollout/processes.py)


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """One device of an engine.

    kv_tokens: of the engine's cache, which every rank holds its heads of. kv_token_bytes: of one token on one
    rank. longest_tree, expected_tree: KV tokens, prompt included, that a tree can have at most, and that the
    driver gives a tree room for once it knows how large they become. problem: why it cannot serve, in one
    line; None where it can.
    """

    memory: Memory
    shard: EngineShard
    kv_tokens: int
    kv_token_bytes: int
    max_requests: int
    chunk_tokens: int
    longest_tree: int
    expected_tree: int
    problem: str | None

    @property
    def longest_trees(self) -> int:
        """Trees in flight, were each as long as can be."""
        return self.kv_tokens // self.longest_tree

    @property
    def expected_trees(self) -> int:
        """Trees in flight as they are expected."""
        return self.kv_tokens // self.expected_tree


def engine_memory(config: RunConfig, folder: Path, left: float) -> EngineMemory:
    """left: bytes of the device that the engine finds free: all, less the trainer's where they share it.

    The model is that of `folder`. Raises ConfigError where engine.tensor ranks cannot share it.
    """
    engine, hardware = config.engine, device(config.plan.device)
    architecture = read_architecture(folder)
    shard = engine_shard(architecture, engine.tensor)
    on_cpu = config.plan.device == "cpu"
    chosen = defaults(hardware.memory / (1 << 20), engine.tensor, graphs=not on_cpu)
    fraction = engine.memory_fraction or chosen.memory_fraction
    value_bytes = element_bytes(config)
    weights, token_bytes = shard.parameters * value_bytes, shard.kv_values * value_bytes
    kv_tokens = max(0, int((left * fraction - weights) // token_bytes))
    limit = engine.max_total_tokens or (_CPU_TOKENS if on_cpu else None)
    if limit is not None:
        kv_tokens = min(kv_tokens, limit)
    load = workload(config)
    expected = _expected_tree(load)
    longest = config.data.max_prompt_tokens + load.sampling.longest_response * load.sampling.width
    kept = left * (1 - fraction)
    memory = Memory(
        owner="engine" if engine.tensor == 1 else f"engine, each of {engine.tensor} ranks",
        parts={"weights": weights, "KV cache": kv_tokens * token_bytes, "activations and runtime": kept},
        notes={
            "weights": f"{shard.parameters:,} parameters x {value_bytes} bytes",
            "KV cache": f"{kv_tokens:,} tokens x {token_bytes:,} bytes",
            "activations and runtime": f"1 - {fraction:g} of the {left / GIB:.1f} GiB that it finds free; "
            + ("engine.memory_fraction" if engine.memory_fraction else "SGLang's default"),
        },
    )
    return EngineMemory(
        memory=memory,
        shard=shard,
        kv_tokens=kv_tokens,
        kv_token_bytes=token_bytes,
        max_requests=most_requests(kv_tokens, architecture.max_positions),
        chunk_tokens=chosen.chunk_tokens,
        longest_tree=longest,
        expected_tree=expected,
        problem=_problem(config, load, memory, left * fraction, kv_tokens, expected),
    )


@lru_cache(maxsize=16)
def _expected_tree(load: Workload) -> int:
    """KV tokens of a tree by the driver's own account, after as many trees as it remembers."""
    driver = TreeDriver([load.engine(InstantEngine())], load.sampling, text_of, load.seed)

    async def grow() -> None:
        async for _ in driver.sample(load.some_prompts(_REMEMBERED_TREES), step=0):
            pass

    run_virtually(grow())
    return driver.expected_tree_tokens(load.prompt_tokens)


def _problem(
    config: RunConfig, load: Workload, memory: Memory, budget: float, kv_tokens: int, expected: int
) -> str | None:
    weights = memory.parts["weights"]
    if weights >= budget:
        return (
            f"engine: its weights are {weights / GIB:.1f} GiB on a device, and weights and KV cache together "
            f"may have {max(budget, 0) / GIB:.1f} GiB (engine.tensor = {config.engine.tensor}, "
            "engine.memory_fraction)"
        )
    request = config.data.max_prompt_tokens + load.sampling.longest_response
    if kv_tokens < request:
        return (
            f"engine: its KV cache holds {kv_tokens:,} tokens, and one request may have {request:,} "
            "(data.max_prompt_tokens + the longest response)"
        )
    if kv_tokens < expected:
        return (
            f"engine: its KV cache holds {kv_tokens:,} tokens, and one tree is expected to need "
            f"{expected:,}: its prefixes would be evicted and computed again"
        )
    return None
