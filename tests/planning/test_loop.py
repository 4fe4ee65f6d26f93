"""Steps of the loop in virtual time: who waits for whom, and how stale trees become."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.support.naive_batching import StatedRates
from tests.support.plan_configs import config, engine
from treepo.config.run import RunConfig
from treepo.data.prompt_order import PromptOrder
from treepo.planning.simulation.loop import LoopTime, SimulatedGrading, SimulatedTrainer, simulate_loop
from treepo.planning.simulation.simulated_engine import SimulatedEngine
from treepo.planning.simulation.virtual_clock import run_virtually
from treepo.planning.simulation.workload import text_of, workload
from treepo.planning.speed.loop import loop_time, simulate_share
from treepo.planning.speed.sampling import simulate
from treepo.planning.speed.step import step_time, trainer_phases
from treepo.rollout.driver import TreeDriver

SYNC_SECONDS = 0.2


def run_config(mode: str = "sync", staleness: int = 1, oversample: float = 1.0, **settings: Any) -> RunConfig:
    return config(
        sampling_oversample=oversample,
        loop={"mode": mode, "max_staleness": staleness},
        placement="split",
        data_prompts_per_step=12,
        engine_count=2,
        **settings,
    )


def steps(run: RunConfig, folder: Path, learn: float, seed: int = 0, number: int = 4) -> LoopTime:
    load = workload(run.model_copy(update={"seed": seed}))
    trainer = SimulatedTrainer(lambda _: learn, SYNC_SECONDS)
    return simulate_loop(run, load, StatedRates(0.002), engine(run, folder), trainer, number)


@pytest.mark.parametrize("learn", [0.1, 20.0])
def test_what_overlaps_is_faster_and_no_tree_is_too_stale(qwen2: Path, learn: float) -> None:
    sync = steps(run_config(), qwen2, learn)
    for run in (run_config(oversample=2.0), *(run_config("async", bound) for bound in (1, 4))):
        loop = steps(run, qwen2, learn)
        assert loop.seconds <= sync.seconds + SYNC_SECONDS
        assert 0 <= loop.engines_idle <= 1
        assert 0 <= loop.trainer_idle <= 1
        assert 0 < loop.staleness <= loop.max_staleness <= run.loop.max_staleness
        assert loop.learning == pytest.approx(learn)
        assert loop.interrupted > 0 or learn == 20.0  # a slow trainer finds nothing growing


@pytest.mark.parametrize("seed", range(2))
def test_a_synchronous_step_is_its_parts_one_after_another(qwen2: Path, seed: int) -> None:
    """Against the driver's own sampling of each step's prompts."""
    run = run_config()
    load, memory = workload(run.model_copy(update={"seed": seed})), engine(run, qwen2)
    prompts = load.some_prompts(48)
    order = PromptOrder(48, seed)
    simulated = [SimulatedEngine(StatedRates(0.002), memory.kv_tokens) for _ in range(2)]
    driver = TreeDriver(
        [load.engine(one) for one in simulated], load.sampling, text_of, seed, memory.kv_tokens
    )

    async def naive() -> float:
        clock = asyncio.get_running_loop()
        first = 0.0
        for step in range(1, 9):
            if step == 5:
                first = clock.time()
            chosen = [prompts[order.index(position)] for position in range(12 * step - 12, 12 * step)]
            async for _ in driver.sample(chosen, step):
                pass
            await asyncio.sleep(1.5)
            for one in simulated:
                await one.begin(step)
            await asyncio.sleep(SYNC_SECONDS)
            for one in simulated:
                one.commit()
        return (clock.time() - first) / 4

    loop = steps(run, qwen2, 1.5, seed, number=4)
    # Additions in another order.
    assert loop.seconds == pytest.approx(run_virtually(naive()), rel=1e-9)
    assert (loop.staleness, loop.max_staleness, loop.interrupted) == (0, 0, 0)


def test_a_slow_trainer_sets_the_time_of_a_step(qwen2: Path) -> None:
    loop = steps(run_config("async"), qwen2, learn=50.0)
    assert loop.seconds == pytest.approx(50.0 + SYNC_SECONDS)
    assert loop.trainer_idle == pytest.approx(SYNC_SECONDS / loop.seconds)


def test_slow_engines_set_the_time_of_a_step(qwen2: Path) -> None:
    loop = steps(run_config("async", 4), qwen2, learn=0.1)
    assert loop.engines_idle < 0.2
    assert loop.trainer_idle > 0.9


def test_grading_delays_only_what_waits_for_it(qwen2: Path) -> None:
    def seconds(run: RunConfig, grading: float) -> float:
        load, memory = workload(run), engine(run, qwen2)
        trainer = SimulatedTrainer(lambda _: 20.0, SYNC_SECONDS)
        return simulate_loop(run, load, StatedRates(), memory, trainer, 4, SimulatedGrading(grading)).seconds

    sync, together = run_config(), run_config("async")
    assert seconds(sync, 3.0) == pytest.approx(seconds(sync, 0.0) + 3.0)
    assert seconds(together, 3.0) == pytest.approx(seconds(together, 0.0))


def test_dropped_trees_are_sampled_in_vain(qwen2: Path) -> None:
    def decoded(equal: float) -> float:
        run = run_config(learning={"dynamic_sampling": True, "max_refills": 8})
        load, memory = workload(run), engine(run, qwen2)
        trainer = SimulatedTrainer(lambda _: 1.0, SYNC_SECONDS)
        grading = SimulatedGrading(equal=equal)
        return simulate_loop(run, load, StatedRates(), memory, trainer, 8, grading).decoded_tokens

    assert decoded(0.5) == pytest.approx(2 * decoded(0.0), rel=0.25)  # some 200 trees


def test_the_same_seed_is_the_same_run(qwen2: Path) -> None:
    first, again, other = (steps(run_config("async"), qwen2, 1.0, seed, number=2) for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize(("prompts", "engines"), [(24, 1), (15, 7)])
def test_a_share_of_the_engines_tells_the_time_of_all(qwen2: Path, prompts: int, engines: int) -> None:
    run = config(
        loop={"mode": "async", "max_staleness": 2},
        placement="split",
        data_prompts_per_step=prompts,
        engine_count=engines,
        engine_max_total_tokens=2000,
    )
    load, memory = workload(run), engine(run, qwen2)
    trees = simulate(run, qwen2, memory).trees
    phases = trainer_phases(run, qwen2, trees)
    whole, part = (
        simulate_share(run, load, StatedRates(), memory, trees, phases, most, steps=5) for most in (10**6, 16)
    )
    # Other trees, and fewer of them.
    assert part.seconds == pytest.approx(whole.seconds, rel=0.15)
    assert part.decoded_tokens == pytest.approx(whole.decoded_tokens, rel=0.1)


def test_a_planned_step_that_overlaps_has_the_simulated_time(qwen2: Path) -> None:
    run = run_config("async")
    memory = engine(run, qwen2)
    sampling = simulate(run, qwen2, memory)
    phases = trainer_phases(run, qwen2, sampling.trees)
    loop = loop_time(run, qwen2, memory, sampling.trees, phases)
    step = step_time(phases, sampling, loop)
    one_by_one = step_time(phases, sampling)
    assert step.seconds == loop.seconds < one_by_one.seconds
    assert step.engines_idle == loop.engines_idle < one_by_one.engines_idle
    assert step.trainer_idle < one_by_one.trainer_idle
    assert one_by_one.seconds == pytest.approx(sum(phase.seconds for phase in one_by_one.phases.values()))
