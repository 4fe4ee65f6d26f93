"""Memory of one device of an engine: weights, KV cache, and the trees that this cache holds.

What the configuration leaves open is chosen as SGLang 0.5.16 does (its server_args.py): `mem_fraction_static`
is the share of the memory free at its start that weights and KV cache take. SGLang keeps back 512 MiB + 1.5 a
token of a prefill chunk + 128 a rank + 2 a request of the largest decoding graph + 8 a
prefill graph, and at least 10 GiB on a device of more than 60 GiB. Its graphs stay in memory while an engine
is offloaded.
"""

from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from pathlib import Path

from sglang_rollout.arguments import CPU_KV_TOKENS, GRAPH_MIB, decode_graph_size
from treepo.config.engine import EngineConfig
from treepo.config.run import RunConfig
from treepo.planning.architecture import planned_architecture
from treepo.planning.hardware import GIB, device
from treepo.planning.memory.adapters import adapter_count
from treepo.planning.memory.engine_shard import EngineShard, engine_shards
from treepo.planning.memory.parts import Memory, element_bytes
from treepo.planning.simulation.lengths import InstantEngine
from treepo.planning.simulation.virtual_clock import run_virtually
from treepo.planning.simulation.workload import Workload, text_of, workload
from treepo.rollout.driver import TreeDriver
from treepo.rollout.router import REMEMBERED_TREES

_GIB_IN_MIB = 1024


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """The device of an engine's pipeline stage that has room for the fewest tokens.

    stages: a rank of each stage. graphs: bytes of its CUDA graphs, estimated as SGLang does; they are part of
    "activations and runtime". kv_tokens: the engine's cache, of which every rank holds its heads and layers.
    longest_tree: the most KV tokens of a tree with its prompt. expected_tree: KV tokens that the driver
    admits a tree with, once it knows how large trees become. problem: why the engine cannot serve, in one
    line; None if it can.
    """

    memory: Memory
    stages: tuple[EngineShard, ...]
    graphs: int
    kv_tokens: int
    max_requests: int
    chunk_tokens: int
    longest_tree: int
    expected_tree: int
    problem: str | None

    @property
    def longest_trees(self) -> int:
        """Trees at once if each has the greatest possible length."""
        return self.kv_tokens // self.longest_tree

    @property
    def expected_trees(self) -> int:
        return self.kv_tokens // self.expected_tree


def engine_memory(config: RunConfig, folder: Path, free: float) -> EngineMemory:
    """An engine of the model in `folder`.

    free: bytes of the device that the engine finds free, the trainer's subtracted if they share it.
    Raises ConfigError if its ranks cannot share the model.
    """
    engine, on_cpu = config.engine, config.plan.device == "cpu"
    architecture = planned_architecture(folder)
    stages = engine_shards(architecture, engine)
    device_mib = device(config.plan.device).memory / (1 << 20)
    batch = 0 if on_cpu else decode_graph_size(config.paths_at_once, device_mib * (1 << 20))
    chosen = sglang_defaults(device_mib, engine.ranks, batch)
    fraction = engine.memory_fraction or chosen.memory_fraction
    value_bytes = element_bytes(config)
    adapter = adapter_count(architecture, config.served_lora) * value_bytes
    budget = free * fraction - adapter
    kv_tokens, shard = min(
        ((_kv_tokens(budget, shard, value_bytes), shard) for shard in stages), key=itemgetter(0)
    )
    weights, token_bytes = shard.parameters * value_bytes, shard.kv_values * value_bytes
    limit = engine.max_total_tokens or (CPU_KV_TOKENS if on_cpu else None)
    if limit is not None:
        kv_tokens = min(kv_tokens, limit)
    load = workload(config)
    expected = _expected_tree(load)
    memory = Memory(
        owner=_owner(engine, stages.index(shard)),
        noted={
            "weights": (weights, f"{shard.parameters:,} parameters x {value_bytes} bytes"),
            **({"adapter": (adapter, "weights.send = adapter; all of it on each rank")} if adapter else {}),
            "KV cache": (kv_tokens * token_bytes, f"{kv_tokens:,} tokens x {token_bytes:,} bytes"),
            "activations and runtime": (
                free * (1 - fraction),
                f"1 - {fraction:g} of the {free / GIB:.1f} GiB that it finds free; "
                + ("engine.memory_fraction" if engine.memory_fraction else "SGLang's default"),
            ),
        },
    )
    return EngineMemory(
        memory=memory,
        stages=tuple(stages),
        graphs=chosen.graphs_mib << 20,
        kv_tokens=kv_tokens,
        max_requests=_max_requests(kv_tokens, architecture.max_positions),
        chunk_tokens=chosen.chunk_tokens,
        longest_tree=config.data.max_prompt_tokens
        + load.sampling.longest_response * load.sampling.most_leaves,
        expected_tree=expected,
        problem=_problem(config, load, memory, free * fraction, kv_tokens, expected),
    )


def _kv_tokens(budget: float, shard: EngineShard, value_bytes: int) -> int:
    """Tokens in the cache of a rank that has `budget` bytes for weights and cache."""
    weights, token_bytes = shard.parameters * value_bytes, shard.kv_values * value_bytes
    return max(0, int((budget - weights) // token_bytes))


def _owner(engine: EngineConfig, stage: int) -> str:
    if engine.ranks == 1:
        return "engine"
    whose = "" if engine.pipeline == 1 else f" of stage {stage}"
    return f"engine, each of {engine.tensor} ranks{whose}"


@lru_cache(maxsize=16)
def _expected_tree(load: Workload) -> int:
    """KV tokens that the driver admits a tree with, after as many trees as it remembers."""
    driver = TreeDriver([load.engine(InstantEngine())], load.sampling, text_of, load.seed)

    async def grow() -> None:
        async for _ in driver.sample(load.some_prompts(REMEMBERED_TREES), step=0):
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
            f"engine.pipeline = {config.engine.pipeline}, engine.memory_fraction)"
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


@dataclass(frozen=True, slots=True)
class SglangDefaults:
    """chunk_tokens: the most of one prefill. memory_fraction: share of the free memory. graphs_mib: memory of
    CUDA graphs.
    """

    chunk_tokens: int
    memory_fraction: float
    graphs_mib: int


def sglang_defaults(memory: float, ranks: int, batch: int) -> SglangDefaults:
    """SGLang's choice on a device of `memory` MiB, for an engine of `ranks`. batch: the largest decoding
    graph; 0 without graphs.
    """
    chunk = next(
        chunk
        for bound, chunk in (
            (35 * _GIB_IN_MIB, 2048),
            (60 * _GIB_IN_MIB, 4096),
            (160 * _GIB_IN_MIB, 8192),
            (float("inf"), 16384),
        )
        if memory < bound
    )
    graphs = GRAPH_MIB * batch + 8 * _prefill_graphs(chunk) if batch else 0
    kept = 512 + 1.5 * chunk + 128 * ranks + graphs
    if memory > 60 * _GIB_IN_MIB:
        kept = max(kept, 10 * _GIB_IN_MIB)
    return SglangDefaults(chunk, round((memory - kept) / memory, 3), graphs)


def _prefill_graphs(tokens: int) -> int:
    """Number of captured prefill sizes, which are closer together where they are small."""
    spans = ((4, 32, 4), (48, 256, 16), (288, 512, 32), (576, 1024, 64), (1280, 4096, 256))
    sizes = [size for start, stop, step in spans for size in range(start, stop + 1, step)]
    return sum(size <= tokens for size in [*sizes, *range(4608, tokens + 1, 512)])


def _max_requests(kv_tokens: int, positions: int) -> int:
    """Requests that SGLang runs at once, for a model of `positions`."""
    return min(max(min(kv_tokens * 512 // positions, 4096), 2048), kv_tokens // 2)
