"""The sampling of one step in virtual time: the real tree driver on simulated engines.

Up to a bound, all trees of the step are grown. Beyond it, a share of the engines is simulated with its share
of the prompts: each tree lives on one engine, and the driver keeps engines evenly loaded. If one engine alone
has more trees than the bound, its second half's time is extrapolated to the rest, because by then the engine
holds as many trees at once as it can. Results are means over seeds; small steps have more of them.
"""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from treepo.config.run import RunConfig
from treepo.planning.memory.engine import EngineMemory
from treepo.planning.simulation.lengths import InstantEngine
from treepo.planning.simulation.rates import Rates
from treepo.planning.simulation.simulated_engine import Counts, SimulatedEngine
from treepo.planning.simulation.virtual_clock import run_virtually
from treepo.planning.simulation.workload import Workload, text_of, workload
from treepo.planning.speed.device_rates import planned_rates
from treepo.rollout.driver import TreeDriver
from treepo.rollout.router import REMEMBERED_TREES
from treepo.tree import Tree

_MAX_TREES = 512  # of one seed, and of all seeds together
_SEEDS = 3


@dataclass(frozen=True, slots=True)
class Sampling:
    """One step, as means over seeds.

    decoded_tokens: by all engines. leaf_tokens: all responses with their shared tokens, as independent
    samples decode them. peak_tokens: the most KV tokens of one engine's running requests. mean_batch:
    requests in a decoding step of one engine. busy: share of the time in which an engine computed. trees: of
    the last seed. share: of the step's trees that were grown.
    """

    seconds: float
    decoded_tokens: float
    leaf_tokens: float
    peak_tokens: float
    mean_batch: float
    busy: float
    trees: tuple[Tree, ...]
    share: float


@dataclass(frozen=True, slots=True)
class _Run:
    """Some prompts on some engines. counts: of each engine."""

    seconds: float
    trees: tuple[Tree, ...]
    counts: tuple[Counts, ...]


def simulate(config: RunConfig, folder: Path, engine: EngineMemory) -> Sampling:
    """The step that `config` samples with the model in `folder`, on engines described by `engine`."""
    rates = planned_rates(config, folder, engine)
    return simulate_step(workload(config), rates, engine, config.engine.count)


def simulate_step(
    load: Workload, rates: Rates, engine: EngineMemory, engines: int, max_trees: int = _MAX_TREES
) -> Sampling:
    """As `simulate`, at any rates. max_trees: grown for one seed."""
    prompts, used_engines = load.prompts, engines
    if prompts > max_trees:
        used_engines = max(1, engines * max_trees // prompts)
        prompts = max(1, round(load.prompts * used_engines / engines))
    grown = min(prompts, max_trees)
    seeds = max(1, min(_SEEDS, max_trees // grown))
    runs = [_grow(load, rates, engine, used_engines, grown, load.seed + index) for index in range(seeds)]
    seconds = fmean(run.seconds for run in runs)
    if prompts > grown:
        half = _grow(load, rates, engine, used_engines, grown // 2, load.seed).seconds
        seconds += (runs[0].seconds - half) * (prompts - grown) / (grown - grown // 2)
    share = grown / load.prompts
    counts = [count for run in runs for count in run.counts]
    return Sampling(
        seconds=seconds,
        decoded_tokens=sum(count.decoded_tokens for count in counts) / seeds / share,
        leaf_tokens=fmean(sum(tree.total_tokens() for tree in run.trees) for run in runs) / share,
        peak_tokens=fmean(max(count.peak_tokens for count in run.counts) for run in runs),
        mean_batch=sum(count.request_steps for count in counts)
        / max(sum(count.steps for count in counts), 1),
        busy=fmean(fmean(count.busy_seconds for count in run.counts) / run.seconds for run in runs),
        trees=runs[-1].trees,
        share=share,
    )


def _grow(load: Workload, rates: Rates, engine: EngineMemory, engines: int, prompts: int, seed: int) -> _Run:
    """Trees of `prompts` prompts, by a driver that has grown as many others before as it remembers."""
    simulated = [
        SimulatedEngine(rates, engine.kv_tokens, engine.max_requests, engine.chunk_tokens)
        for _ in range(engines)
    ]
    forced = [load.engine(InstantEngine()) for _ in simulated]
    driver = TreeDriver(forced, load.sampling, text_of, seed, engine.kv_tokens)

    async def work() -> tuple[float, list[Tree]]:
        await _trees(driver, load, REMEMBERED_TREES, step=0)
        for one, real in zip(forced, simulated, strict=True):
            one.engine = real
        loop = asyncio.get_running_loop()
        start = loop.time()
        trees = await _trees(driver, load, prompts, step=1)
        return loop.time() - start, trees

    seconds, trees = run_virtually(work())
    return _Run(seconds, tuple(trees), tuple(one.counts for one in simulated))


async def _trees(driver: TreeDriver, load: Workload, prompts: int, step: int) -> list[Tree]:
    """Trees in the order of their prompts: the first to end are the smallest."""
    trees: list[Tree] = []
    async for tree in driver.sample(load.some_prompts(prompts), step):
        assert isinstance(tree, Tree), tree
        trees.append(tree)
    return sorted(trees, key=lambda tree: int(tree.prompt_id))
