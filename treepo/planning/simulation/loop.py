"""Steps of the training loop in virtual time: the real scheduler, supply and driver on simulated engines.

The trainer and the grader only take their time. Which trees have nothing to teach, so that dynamic sampling
drops them, is drawn independently of their lengths. The first steps are not measured: by then as many trees
grow as the loop allows, and the router knows how large they become.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from treepo.config.run import RunConfig
from treepo.data.prompt_order import PromptOrder
from treepo.data.prompts import Prompt, PromptSet
from treepo.planning.memory.engine import EngineMemory
from treepo.planning.simulation.lengths import InstantEngine
from treepo.planning.simulation.rates import Rates
from treepo.planning.simulation.simulated_engine import SimulatedEngine
from treepo.planning.simulation.simulated_pool import SimulatedPool
from treepo.planning.simulation.virtual_clock import run_virtually
from treepo.planning.simulation.workload import Workload, half_correct, text_of
from treepo.rewards.grade import Grade
from treepo.rollout import rng
from treepo.rollout.driver import TreeDriver
from treepo.rollout.router import REMEMBERED_TREES
from treepo.training.scheduler import Scheduler, ScheduleState
from treepo.training.tree_grader import TreeGrader
from treepo.training.tree_supply import TreeSupply
from treepo.tree import Tree

_PROMPTS = 4  # for each tree that may grow or be ready: none is short of a prompt
_FIRST_STEPS = 3  # that are not measured, and one for each version of staleness


@dataclass(frozen=True, slots=True)
class SimulatedTrainer:
    """learn: seconds for the trees of a step. sync_seconds: of a weight sync."""

    learn: Callable[[Sequence[Tree]], float]
    sync_seconds: float


@dataclass(frozen=True, slots=True)
class SimulatedGrading:
    """seconds: from the end of a tree to its grades. equal: share of trees whose answers are all wrong."""

    seconds: float = 0.0
    equal: float = 0.0


AT_ONCE = SimulatedGrading()


@dataclass(frozen=True, slots=True)
class LoopTime:
    """A step, as a mean over the measured ones.

    seconds: from weight sync to weight sync. sampling, learning: of these, seconds in which an engine, or the
    trainer, computed. decoded_tokens: by all engines. interrupted: requests. staleness, max_staleness: of a
    trained tree, in versions; the mean and the largest.
    """

    seconds: float
    sampling: float
    learning: float
    decoded_tokens: float
    interrupted: float
    staleness: float
    max_staleness: int

    @property
    def engines_idle(self) -> float:
        """Share of time in which an engine computes nothing, weight syncs included."""
        return 1 - self.sampling / self.seconds

    @property
    def trainer_idle(self) -> float:
        """Share of time in which the trainer computes nothing, weight syncs included."""
        return 1 - self.learning / self.seconds


@dataclass(frozen=True, slots=True)
class _Mark:
    """Sums at the end of a step."""

    at: float
    busy: float
    learning: float
    decoded: int
    interrupted: int


def simulate_loop(
    config: RunConfig,
    load: Workload,
    rates: Rates,
    engine: EngineMemory,
    trainer: SimulatedTrainer,
    steps: int,
    grading: SimulatedGrading = AT_ONCE,
) -> LoopTime:
    """`steps` steps of the loop that `config` describes, with its prompts a step and its number of engines.

    load: seed, sampling and lengths. engine: of each of the engines.
    """
    simulated = [
        SimulatedEngine(rates, engine.kv_tokens, engine.max_requests, engine.chunk_tokens)
        for _ in range(config.engine.count)
    ]
    forced = [load.engine(InstantEngine()) for _ in simulated]
    samplers = dict(zip(map(id, simulated), forced, strict=True))
    pool = SimulatedPool(
        simulated,
        lambda one: samplers[id(one)],
        engine.kv_tokens,
        trainer.sync_seconds,
        sampling_goes_on=config.loop.mode == "async",
    )
    driver = TreeDriver(pool.engines, load.sampling, text_of, load.seed, engine.kv_tokens)
    run = _Run(config, load, pool, driver, trainer, grading)

    async def work() -> LoopTime:
        await _grow_instantly(driver, load)
        for one, real in zip(forced, simulated, strict=True):
            one.engine = real
        return await run.steps(steps)

    return run_virtually(work())


class _Run:
    def __init__(
        self,
        config: RunConfig,
        load: Workload,
        pool: SimulatedPool,
        driver: TreeDriver,
        trainer: SimulatedTrainer,
        grading: SimulatedGrading,
    ) -> None:
        self._config, self._pool, self._trainer = config, pool, trainer
        self._unmeasured = _FIRST_STEPS + config.loop.max_staleness
        prompts = load.some_prompts(_PROMPTS * config.max_untrained)
        order = PromptOrder(len(prompts), load.seed)
        endless = config.model_copy(update={"steps": 1 << 30})  # in the last steps fewer trees grow
        scheduler = Scheduler.of_run(endless, order, 0, ScheduleState())
        grader = _Grader(grading, load.seed)
        self._supply = TreeSupply(config, _Prompts(prompts), order, scheduler, driver, grader)
        self._learning = 0.0

    async def steps(self, number: int) -> LoopTime:
        staleness: list[int] = []
        first = self._mark()
        async with self._supply.running(self._pool):
            for step in range(1, self._unmeasured + number + 1):
                batch = await self._supply.batch(step)
                async with self._pool.training():
                    seconds = self._trainer.learn(batch.trained)
                    await asyncio.sleep(seconds)
                    await self._pool.sync_weights(step)
                self._supply.trained(self._supply.take_sampled().stats.decoded_tokens)
                self._learning += seconds
                if step == self._unmeasured:
                    first = self._mark()
                elif step > self._unmeasured:
                    staleness += batch.staleness
            last = self._mark()
        return LoopTime(
            seconds=(last.at - first.at) / number,
            sampling=(last.busy - first.busy) / number / len(self._pool.simulated),
            learning=(last.learning - first.learning) / number,
            decoded_tokens=(last.decoded - first.decoded) / number,
            interrupted=(last.interrupted - first.interrupted) / number,
            staleness=fmean(staleness),
            max_staleness=max(staleness),
        )

    def _mark(self) -> _Mark:
        counts = [engine.counts for engine in self._pool.simulated]
        return _Mark(
            asyncio.get_running_loop().time(),
            sum(one.busy_seconds for one in counts),
            self._learning,
            sum(one.decoded_tokens for one in counts),
            sum(one.interrupted for one in counts),
        )


class _Prompts(PromptSet):
    """Prompts in memory."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts = prompts

    def __len__(self) -> int:
        return len(self._prompts)

    def take(self, indices: Sequence[int]) -> list[Prompt]:
        return [self._prompts[index] for index in indices]


class _Grader(TreeGrader):
    def __init__(self, grading: SimulatedGrading, seed: int) -> None:
        self._grading = grading
        self._generator = rng.generator("equal", seed)

    async def grade(
        self,
        tree: Tree,
        prompt: Prompt,  # noqa: ARG002 - the base class's signature
        grades: Sequence[Grade] | None = None,
    ) -> Tree:
        assert grades is None  # the simulated policies read no rewards
        await asyncio.sleep(self._grading.seconds)
        if self._generator.random() < self._grading.equal:
            return replace(tree, leaves=tuple(replace(leaf, reward=0.0) for leaf in tree.leaves))
        return half_correct(tree)

    def check(self, what: str) -> None:
        pass


async def _grow_instantly(driver: TreeDriver, load: Workload) -> None:
    """As many trees as the router remembers."""
    async for tree in driver.sample(load.some_prompts(REMEMBERED_TREES), step=0):
        assert isinstance(tree, Tree), tree
