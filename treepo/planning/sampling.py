"""A step's sampling in virtual time: the real tree driver on simulated engines.

All trees of the step are grown, up to a bound; beyond it a part of the engines is simulated with its part of
the prompts, which is sound because each tree lives on one engine and the driver keeps them evenly loaded.
Where one engine alone has more trees than the bound, what the last half of them added to the time is what
the rest adds: by then the engine holds as many trees at once as it can. Means are over seeds, more of them
where steps are small.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_bridge.architecture import read_architecture
from treepo.config.run import RunConfig
from treepo.planning.engine import EngineMemory
from treepo.planning.hardware import device
from treepo.planning.memory import element_bytes
from treepo.planning.simulation.device_rates import DeviceRates
from treepo.planning.simulation.lengths import InstantEngine
from treepo.planning.simulation.rates import Rates
from treepo.planning.simulation.simulated_engine import Counts, SimulatedEngine
from treepo.planning.simulation.virtual_clock import run_virtually
from treepo.planning.simulation.workload import Workload, text_of, workload
from treepo.rollout.driver import TreeDriver
from treepo.tree import Tree

_WARM_UP_TREES = 64  # as many as a driver remembers
_MOST_TREES = 512  # of one seed; of all together
_SEEDS = 3


@dataclass(frozen=True, slots=True)
class Sampling:
    """One step's, means over seeds.

    decoded_tokens: by all engines. leaf_tokens: of all responses, a shared token once for each: what
    independent samples decode. peak_tokens: most KV tokens of one engine's running requests. mean_batch:
    requests that a decoding step of one engine decodes for. trees: of the last seed; `share` of the step's.
    """

    seconds: float
    decoded_tokens: float
    leaf_tokens: float
    peak_tokens: float
    mean_batch: float
    trees: tuple[Tree, ...]
    share: float


@dataclass(frozen=True, slots=True)
class Simulated:
    """Some prompts on some engines. counts: each engine's."""

    seconds: float
    trees: tuple[Tree, ...]
    counts: tuple[Counts, ...]


def simulate(config: RunConfig, folder: Path, engine: EngineMemory) -> Sampling:
    """The step that `config` samples with the model of `folder`, on engines that `engine` describes."""
    rates = DeviceRates(
        device(config.plan.device),
        read_architecture(folder),
        engine.shard,
        config.engine.tensor,
        element_bytes(config),
    )
    return simulate_step(workload(config), rates, engine, config.engine.count)


def simulate_step(
    load: Workload, rates: Rates, engine: EngineMemory, engines: int, most_trees: int = _MOST_TREES
) -> Sampling:
    """As `simulate`, at any rates. most_trees: that are grown for one seed."""
    prompts, part = load.prompts, engines
    if prompts > most_trees:
        part = max(1, engines * most_trees // prompts)
        prompts = max(1, round(load.prompts * part / engines))
    beyond = max(0, prompts - most_trees)
    grown = prompts - beyond
    seeds = max(1, min(_SEEDS, most_trees // grown))
    runs = [grow(load, rates, engine, part, grown, load.seed + index) for index in range(seeds)]
    seconds = sum(run.seconds for run in runs) / seeds
    if beyond:
        half = grow(load, rates, engine, part, grown // 2, load.seed).seconds
        seconds += (runs[0].seconds - half) * beyond / (grown - grown // 2)
    share = grown / load.prompts
    steps = sum(count.steps for run in runs for count in run.counts)
    return Sampling(
        seconds=seconds,
        decoded_tokens=_mean([sum(count.decoded_tokens for count in run.counts) for run in runs]) / share,
        leaf_tokens=_mean([sum(tree.total_tokens() for tree in run.trees) for run in runs]) / share,
        peak_tokens=_mean([max(count.peak_tokens for count in run.counts) for run in runs]),
        mean_batch=sum(count.request_steps for run in runs for count in run.counts) / max(steps, 1),
        trees=runs[-1].trees,
        share=share,
    )


def grow(
    load: Workload, rates: Rates, engine: EngineMemory, engines: int, prompts: int, seed: int
) -> Simulated:
    """Trees of `prompts` prompts on so many engines, by a driver that has grown others before."""
    simulated = [
        SimulatedEngine(rates, engine.kv_tokens, engine.max_requests, engine.chunk_tokens)
        for _ in range(engines)
    ]
    forced = [load.engine(InstantEngine()) for _ in simulated]
    driver = TreeDriver(forced, load.sampling, text_of, seed, engine.kv_tokens)

    async def work() -> tuple[float, list[Tree]]:
        await _collect(driver, load, _WARM_UP_TREES, step=0)
        for one, real in zip(forced, simulated, strict=True):
            one.engine = real
        loop = asyncio.get_running_loop()
        start = loop.time()
        trees = await _collect(driver, load, prompts, step=1)
        return loop.time() - start, trees

    seconds, trees = run_virtually(work())
    return Simulated(seconds, tuple(trees), tuple(one.counts for one in simulated))


async def _collect(driver: TreeDriver, load: Workload, prompts: int, step: int) -> list[Tree]:
    trees: list[Tree] = []
    async for tree in driver.sample(load.some_prompts(prompts), step):
        assert isinstance(tree, Tree), tree
        trees.append(tree)
    return trees


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
