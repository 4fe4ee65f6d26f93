"""Two real engines are killed while they sample: no tree is lost or mixed, and both engines come back."""

import asyncio
import os
import signal
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from torch import Tensor

from tests.support.paths import ROOT
from tests.support.sampling_policies import sampling
from treepo.config.rollout import RolloutConfig
from treepo.config.weights import WeightsConfig
from treepo.data.prompts import Prompt
from treepo.rollout.driver import TreeDriver
from treepo.rollout.stopping import StopRule
from treepo.tree import Tree
from treepo.weight_sync.lanes import LocalSource
from treepo.weight_sync.send import Outcome, WeightStream, open_sender
from treepo.weight_sync.wire import Manifest, TensorInfo

pytestmark = pytest.mark.slow
TREES = 24


def decode(tokens: np.ndarray) -> str:
    return "".join("\\boxed{7}" if token == 4 else chr(token + 200) for token in tokens)


class FakeTrainer:
    """Sends fixed weights as trainer rank 0 does."""

    def __init__(self, weights: dict[str, Tensor], folder: Path) -> None:
        self._weights = weights
        self._stream = WeightStream(open_sender(WeightsConfig(), folder, "127.0.0.1", 60), 1 << 18, 60)

    async def manifest(self) -> Manifest:
        return tuple(TensorInfo.of(name, tensor) for name, tensor in self._weights.items())

    async def send_weights(self, version: int, sinks: Sequence[Any]) -> Outcome:
        source = LocalSource(self._weights.items(), await self.manifest())
        return await asyncio.to_thread(self._stream.send, source, version, sinks)

    async def restart(self) -> None: ...

    async def offload(self, weights: bool) -> None: ...

    async def reload(self) -> None: ...

    async def release_cache(self) -> None: ...


async def _pids(actor: Any) -> tuple[int, list[int]]:
    """The process of an engine's actor, and the SGLang processes that it started."""
    return await actor.__ray_call__.remote(
        lambda engine: (os.getpid(), [child.pid for child in engine._sglang._children])
    )


async def _halt_while_it_answers(driver: TreeDriver, engine: int, processes: list[int]) -> None:
    """SIGSTOP the engine's SGLang, so that it keeps requests in flight."""
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    while not any(pending.engine == engine for pending in driver.pending()):
        await asyncio.sleep(0.01)


def test_killed_engines_lose_no_tree_and_serve_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import Qwen2ForCausalLM

    from tests.support.real_engine import perturbed, write_model
    from treepo.cluster.engine_devices import EngineDevices
    from treepo.cluster.pooled_engine import State
    from treepo.cluster.ray_engine import EngineLauncher
    from treepo.cluster.reservation import unreserved_engines
    from treepo.cluster.session import ray_session
    from treepo.cluster.training_engine_pool import TrainingEnginePool

    config = RolloutConfig.model_validate(
        {
            "out": "unused",
            "model": {"path": str(write_model(tmp_path)), "dtype": "float32"},
            "data": {"prompts": "unused.jsonl"},
            "engine": {"count": 2, "max_total_tokens": 20_000, "max_restarts": 2},
        }
    )
    policy = sampling(retry_seconds=0.1)
    torch.manual_seed(0)
    weights = perturbed(Qwen2ForCausalLM.from_pretrained(config.model.path, dtype=torch.float32))

    trainer = FakeTrainer(weights, tmp_path)

    async def scenario() -> None:
        devices = EngineDevices(unreserved_engines(config.engine), may_move=True, seconds=60)
        launcher = EngineLauncher(config, StopRule(policy, decode), devices, shares_devices=False)
        pool = TrainingEnginePool(
            launcher, config.engine, trainer, shares_devices=False, sampling_goes_on=False
        )
        try:
            await pool.ready()
            first, second = pool.engines
            async with pool.training():
                await pool.sync_weights(1)
            driver = TreeDriver(pool.engines, policy, decode, seed=3, kv_tokens=pool.kv_tokens)
            (_, one), (actor, other) = [await _pids(engine.process.actor) for engine in pool.engines]
            trees = await _sample(driver, lambda: _kill_both(driver, first, one, actor, other))
            assert driver.stats.failed_requests >= 2
            assert sorted(tree.prompt_id for tree in trees) == sorted(prompt.id for prompt in PROMPTS)
            assert not any(psutil.pid_exists(pid) for pid in (*one, actor, *other))
            while not all(engine.state is State.SERVING for engine in pool.engines):
                await asyncio.sleep(0.1)
            assert pool.restarts == 2
            for tree in trees:
                assert len(tree.leaves) == policy.width
                assert all((segment.versions == 1).all() for segment in tree.segments)
            for engine in (first, second):
                for tree in trees[:4]:
                    await _check(tree, engine)
        finally:
            await pool.close()

    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for `decode`, in the engines' processes
    with ray_session(2, tmp_path):
        asyncio.run(scenario())


PROMPTS = [
    Prompt(f"p:{i}", np.random.default_rng(i).integers(5, 128, size=20, dtype=np.int32), "", "", "")
    for i in range(TREES)
]


async def _sample(driver: TreeDriver, disturb: Any) -> list[Tree]:
    """Sample all trees; `disturb` runs beside the sampling."""
    trees: list[Tree] = []
    async with asyncio.TaskGroup() as group, aclosing(driver.sample(PROMPTS, step=0)) as results:
        group.create_task(disturb())
        async for result in results:
            assert isinstance(result, Tree), result
            trees.append(result)
    return trees


async def _kill_both(driver: TreeDriver, first: Any, one: list[int], actor: int, other: list[int]) -> None:
    """Kill the first engine's SGLang, and the second's Ray actor when the first's death is known. Both have
    requests in flight.
    """
    from treepo.cluster.pooled_engine import State

    while driver.stats.requests < 2 * TREES:  # a tenth of all
        await asyncio.sleep(0.01)
    await _halt_while_it_answers(driver, 0, one)
    await _halt_while_it_answers(driver, 1, other)  # before the other's death: there may be no work left then
    os.kill(one[0], signal.SIGKILL)
    while first.state is State.SERVING:
        await asyncio.sleep(0.01)
    os.kill(actor, signal.SIGKILL)


async def _check(tree: Tree, engine: Any) -> None:
    """A restarted engine computes the log-probs with which the tree was sampled: it has the weights of the
    version, and every segment was sampled under the tokens that the tree shows above it.
    """
    for leaf in tree.leaves:
        whole = np.concatenate([tree.prompt, tree.response(leaf)])
        computed = (await engine.process.actor.log_probs.remote(whole))[len(tree.prompt) - 1 :]
        sampled = np.concatenate([tree.segments[i].log_probs for i in tree.path(leaf.segment)])
        # Float32 of one model, in one pass and token by token: a few roundings apart.
        np.testing.assert_allclose(sampled, computed, atol=2e-5, rtol=1e-5)
