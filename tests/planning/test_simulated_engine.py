"""The simulated engine: its clock, its cache, and its batches against a naive step-by-step engine."""

import asyncio
import random

import numpy as np
import pytest

from tests.support.naive_batching import NaiveEngine, StatedRates
from treepo.config.sampling import SamplingConfig
from treepo.errors import EngineError
from treepo.planning.simulation.lengths import DrawnEnds, ForcedLengths, LogNormal, random_prompts
from treepo.planning.simulation.prefix_cache import PrefixCache
from treepo.planning.simulation.simulated_engine import SimulatedEngine
from treepo.planning.simulation.virtual_clock import run_virtually
from treepo.planning.simulation.workload import text_of
from treepo.protocols import GenerateRequest, Sampler
from treepo.rollout.driver import TreeDriver
from treepo.tree import Tree

SAMPLING = SamplingConfig.model_validate(
    {
        "segment_tokens": 16,
        "max_depth": 6,
        "width": 8,
        "max_response_tokens": 96,
        "stops": {"boxed": "off", "repetition": {"check": "off"}},
    }
)
LENGTHS = LogNormal(mean=40.0, sigma=0.6)


def sample(
    engines: list[Sampler],
    sampling: SamplingConfig = SAMPLING,
    prompts: int = 6,
    kv_tokens: int | None = None,
) -> tuple[float, list[Tree]]:
    """Virtual seconds and trees, in the order of prompts."""
    ends = DrawnEnds(LENGTHS)
    driver = TreeDriver([ForcedLengths(one, ends) for one in engines], sampling, text_of, 0, kv_tokens)

    async def work() -> tuple[float, list[Tree]]:
        results = driver.sample(random_prompts(prompts, 12, 4096), step=1)
        trees = [tree async for tree in results if isinstance(tree, Tree)]
        return asyncio.get_running_loop().time(), trees

    seconds, trees = run_virtually(work())
    assert len(trees) == prompts
    return seconds, sorted(trees, key=lambda tree: int(tree.prompt_id))


def shapes(trees: list[Tree]) -> list[list[tuple[int, int]]]:
    return [[(segment.parent, len(segment.tokens)) for segment in tree.segments] for tree in trees]


def test_virtual_time_passes_at_once_and_in_order() -> None:
    heard: list[tuple[str, float]] = []

    async def sleeper(name: str, seconds: float) -> None:
        for _ in range(2):
            await asyncio.sleep(seconds)
            heard.append((name, asyncio.get_running_loop().time()))

    async def both() -> None:
        await asyncio.gather(sleeper("day", 86400.0), sleeper("week", 7 * 86400.0))

    run_virtually(both())
    assert heard == [("day", 86400.0), ("day", 172800.0), ("week", 604800.0), ("week", 1209600.0)]


def test_waiting_without_a_timer_is_an_error() -> None:
    async def forever() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="never come"):
        run_virtually(forever())


@pytest.mark.parametrize("seed", range(20))
def test_the_cache_holds_what_was_inserted_and_keeps_what_is_locked(seed: int) -> None:
    draw = random.Random(seed)
    cache, whole, locked = PrefixCache(), [], []
    for _ in range(120):
        start = draw.choice(whole)[: draw.randint(0, 12)] if whole else []
        sequence = start + [draw.randrange(3) for _ in range(draw.randint(1, 8))]
        action = draw.choice(["insert", "insert", "lock", "unlock", "evict"])
        if action == "insert":
            before = cache.size
            _, new = cache.insert(np.array(sequence, dtype=np.int32))
            assert cache.size == before + new
            whole.append(sequence)
        elif action == "lock" and whole:
            chosen = draw.choice(whole)
            node, length = cache.match(np.array(chosen, dtype=np.int32))
            cache.lock(node)
            locked.append((node, chosen[:length]))
        elif action == "unlock" and locked:
            cache.unlock(locked.pop(draw.randrange(len(locked)))[0])
        elif action == "evict":
            wanted, before = draw.randint(1, 10), cache.size
            possible = cache.size - cache.locked
            cache.evict(wanted)
            assert before - cache.size >= min(wanted, possible)
        prefixes = {tuple(held[:n]) for _, held in locked for n in range(1, len(held) + 1)}
        assert cache.locked == len(prefixes)
        assert all(cache.match(np.array(held, dtype=np.int32))[1] == len(held) for _, held in locked)
    for node, _ in locked:
        cache.unlock(node)
    cache.evict(10**6)
    assert (cache.size, cache.locked) == (0, 0)


@pytest.mark.parametrize("mode", ["tree", "sequential"])
@pytest.mark.parametrize("latency", [0.0, 0.013])
def test_events_are_those_of_step_after_step(mode: str, latency: float) -> None:
    sampling = SAMPLING.model_copy(update={"mode": mode, "max_live_trees": 3})
    naive, simulated = NaiveEngine(StatedRates(latency)), SimulatedEngine(StatedRates(latency), 10**6)
    slow_seconds, slow_trees = sample([naive], sampling)
    seconds, trees = sample([simulated], sampling)
    assert shapes(trees) == shapes(slow_trees)
    assert simulated.counts.steps == naive.steps
    assert simulated.counts.prefilled_tokens == naive.prefilled
    # Thousands of steps summed in another order, on a clock that adds rounded times.
    assert seconds == pytest.approx(slow_seconds, rel=1e-9)


def test_the_same_run_is_the_same() -> None:
    first, second = SimulatedEngine(StatedRates(), 2000), SimulatedEngine(StatedRates(), 2000)
    seconds, trees = sample([first], kv_tokens=2000)
    again, others = sample([second], kv_tokens=2000)
    assert seconds == again
    assert shapes(trees) == shapes(others)
    assert first.counts == second.counts


def test_no_token_is_lost_or_decoded_twice() -> None:
    engines = [SimulatedEngine(StatedRates(), 10**6) for _ in range(2)]
    _, trees = sample([*engines], prompts=10)
    decoded = sum(engine.counts.decoded_tokens for engine in engines)
    assert decoded == sum(tree.unique_tokens() for tree in trees)
    steps = sum(engine.counts.request_steps for engine in engines)
    assert steps < decoded  # the prefill makes the first token of each request


@pytest.mark.parametrize(("mode", "kv_tokens"), [("tree", 300), ("tree", 700), ("sequential", 300)])
def test_a_full_cache_costs_time_and_is_never_over_full(mode: str, kv_tokens: int) -> None:
    """Without the driver's own bound: requests are retracted, prefixes evicted and computed again."""
    sampling = SAMPLING.model_copy(update={"mode": mode})
    roomy, tight = SimulatedEngine(StatedRates(), 10**6), SimulatedEngine(StatedRates(), kv_tokens)
    roomy_seconds, trees = sample([roomy], sampling, prompts=12)
    tight_seconds, others = sample([tight], sampling, prompts=12)
    assert shapes(trees) == shapes(others)
    assert tight.counts.peak_tokens <= kv_tokens
    assert (tight.counts.retractions > 0) == (kv_tokens == 300)
    if (
        mode == "tree"
    ):  # each of a prompt's requests in one batch computes the prompt; a roomy engine batches them all
        assert tight.counts.prefilled_tokens > roomy.counts.prefilled_tokens
    assert tight.counts.decoded_tokens == roomy.counts.decoded_tokens
    assert tight.counts.mean_batch < roomy.counts.mean_batch
    assert tight_seconds > roomy_seconds


def test_a_request_that_cannot_fit_is_refused() -> None:
    request = GenerateRequest(np.arange(90, dtype=np.int32), 90, 11, 1.0, 0)
    with pytest.raises(EngineError, match="101 tokens do not fit into a KV cache of 100"):
        run_virtually(SimulatedEngine(StatedRates(), 100).generate(request))


def test_twice_the_engines_take_half_the_time() -> None:
    one, _ = sample([SimulatedEngine(StatedRates(), 4000)], prompts=60, kv_tokens=4000)
    two, _ = sample([SimulatedEngine(StatedRates(), 4000) for _ in range(2)], prompts=60, kv_tokens=4000)
    assert 0.45 < two / one < 0.6  # each has its own last tree
