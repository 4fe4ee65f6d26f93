"""Forced lengths and the lock-step driver of benchmarks/rollout*.py."""

import asyncio
import json
import os
import statistics
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.rollout_comparison import ReplayedEnds, grow_in_lockstep, text_of
from tests.support.fake_engine import FakeEngine
from tests.support.paths import ROOT
from treepo.config.sampling import SamplingConfig
from treepo.planning.simulation.lengths import DrawnEnds, ForcedLengths, LogNormal, random_prompts
from treepo.rollout.driver import TreeDriver
from treepo.tree import PROMPT, Tree

LENGTHS = LogNormal(mean=28.0, sigma=0.5)
SAMPLING = SamplingConfig(segment_tokens=8, max_depth=14, width=16, max_response_tokens=112)


def _collect(engine: ForcedLengths, sampling: SamplingConfig) -> list[Tree]:
    async def collect() -> list[Tree]:
        driver = TreeDriver([engine], sampling, text_of, seed=0)
        return [
            tree async for tree in driver.sample(random_prompts(20, 5, 100), step=1) if isinstance(tree, Tree)
        ]

    return sorted(asyncio.run(collect()), key=lambda tree: tree.prompt_id)


def _shape(tree: Tree) -> list[tuple[int, int]]:
    return [(segment.parent, len(segment.tokens)) for segment in tree.segments]


def test_lengths_have_their_mean_however_often_they_are_redrawn() -> None:
    """Redrawing a length, given that it exceeds the response so far, keeps its distribution."""
    at_once = [LENGTHS.draw(0, seed) for seed in range(4000)]
    in_steps = []
    for seed in range(4000):
        above, length = 0, LENGTHS.draw(0, seed)
        while length > above + 8:
            above += 8
            length = LENGTHS.draw(above, seed=10_000 + 100 * seed + above)
        in_steps.append(length)
    # Rounding up adds half a token. One draw's standard deviation is 15, the mean's of 4000 is 0.24; the
    # tolerance is four of those.
    assert statistics.mean(at_once) == pytest.approx(28.5, abs=1.0)
    assert statistics.mean(in_steps) == pytest.approx(28.5, abs=1.0)
    spread = np.percentile(at_once, [10, 50, 90]) - np.percentile(in_steps, [10, 50, 90])
    assert np.abs(spread).max() < 2.5  # a tenth of these numbers, five standard deviations of the last


def test_lockstep_grows_the_same_trees() -> None:
    drawn = DrawnEnds(LENGTHS)
    trees = _collect(ForcedLengths(FakeEngine(), drawn), SAMPLING)
    lockstep = asyncio.run(
        grow_in_lockstep(
            ForcedLengths(FakeEngine(), drawn), random_prompts(20, 5, 100), SAMPLING, seed=0, step=1
        )
    )
    lockstep.sort(key=lambda tree: tree.prompt_id)
    assert list(map(_shape, trees)) == list(map(_shape, lockstep))
    assert all(len(tree.leaves) == 16 for tree in trees)


def test_the_leaves_of_trees_are_replayed_one_by_one() -> None:
    trees = _collect(ForcedLengths(FakeEngine(), DrawnEnds(LENGTHS)), SAMPLING)
    replayed = ReplayedEnds()
    replayed.replay(trees)
    engine = ForcedLengths(FakeEngine(), replayed)
    samples = _collect(engine, SAMPLING.model_copy(update={"mode": "sequential"}))
    for tree, independent in zip(trees, samples, strict=True):
        assert sorted(len(tree.response(leaf)) for leaf in tree.leaves) == sorted(
            len(independent.response(leaf)) for leaf in independent.leaves
        )
        starts = [segment for segment in independent.segments if segment.parent == PROMPT]
        assert len(starts) == 16
    assert engine.decoded_tokens == sum(tree.total_tokens() for tree in trees)


@pytest.mark.slow
def test_the_gpu_benchmark_runs_dry_on_a_cpu() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.rollout", "--dry-run", "--repeats", "1"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (line,) = map(json.loads, result.stdout.splitlines())
    assert line["cached_token_ratio"] > 0.98
    assert line["total_over_unique"] > 1
    assert line["tree"]["decoded_tokens"] == line["lockstep"]["decoded_tokens"]
    assert line["sequential"]["decoded_tokens"] > line["tree"]["decoded_tokens"]
    assert line["tree_over_sequential"] > 0
    assert line["tree_over_lockstep"] > 0
