"""Weight syncs from real Megatron-Core ranks to real SGLang engines through Ray, by every transport."""

import asyncio
import os
import signal
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import pytest

from tests.support.paths import ROOT
from tests.support.random_trees import random_tree
from tests.support.tiny import write_tiny_qwen2
from treepo.cluster import ray_engine, trainer_group
from treepo.cluster.engine_devices import EngineDevices
from treepo.cluster.engine_pool import EnginePool
from treepo.cluster.ray_engine import EngineLauncher, HostedEngine, RayEngine
from treepo.cluster.reservation import reserve
from treepo.cluster.session import ray_session
from treepo.cluster.trainer_group import TrainerGroup, TrainerRank
from treepo.config.learning import LearningConfig
from treepo.config.run import RunConfig
from treepo.config.sampling import SamplingConfig
from treepo.errors import EngineError, TrainerError
from treepo.learning import advantage, loss
from treepo.learning.packing import Pack, pack_trees
from treepo.protocols import GenerateRequest, MiniBatch
from treepo.rollout.stopping import StopRule
from treepo.tree import PROMPT, Finish, Leaf, Segment, Stop, Tree, Verdict
from treepo.weight_sync.shards import read_bytes
from treepo.weight_sync.transaction import update_weights
from treepo.weight_sync.wire import Bucket

pytestmark = pytest.mark.slow

Transport = Literal["colocated", "broadcast", "host_broadcast", "disk"]
TRANSPORTS: tuple[Transport, ...] = ("colocated", "broadcast", "host_broadcast", "disk")
VOCABULARY = 1024
# Float32 on both sides: the same tokens through two implementations of two layers.
TOLERANCE = 1e-4
TOKENS = np.random.default_rng(1).integers(4, VOCABULARY, 40).astype(np.int32)
REQUEST = GenerateRequest(TOKENS, len(TOKENS), max_tokens=4, temperature=1.0, seed=0)


def config_of(folder: Path, tensor: int, send: str) -> RunConfig:
    """send: `weights.send`; the adapter is large enough for two buckets."""
    return RunConfig.model_validate(
        {
            "out": folder / "run",
            "steps": 1,
            "model": {"path": folder / "model", "dtype": "float32"},
            "data": {"train": "none.jsonl", "prompts_per_step": 1, "max_prompt_tokens": 64},
            "sampling": {"max_response_tokens": 128, "segment_tokens": 16, "max_depth": 8},
            "trainer": {
                "parallel": {"tensor": 2, "pipeline": 2},
                "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0},
                "max_tokens_per_pack": 512,
                "lora": {"rank": 64} if send == "adapter" else None,
            },
            "engine": {
                "count": 2,
                "tensor": tensor,
                "max_total_tokens": 4096,
                "update_seconds": 60,
                "max_restarts": 0,
            },
            "weights": {"bucket_mb": 1, "send": send},
        }
    )


def batch() -> tuple[list[Pack], float]:
    """A few trees in one pack, as one replica trains on them, and the loss denominator."""
    rng, learning = np.random.default_rng(0), LearningConfig()
    trees = [random_tree(rng, f"p{index}", vocabulary=VOCABULARY) for index in range(3)]
    (packs,) = pack_trees(trees, advantage.estimate(trees, learning), 512, 1)
    return packs, loss.denominator([packs], learning)


async def take_step(trainer: TrainerGroup) -> None:
    packs, denominator = batch()
    await trainer.train_batch([MiniBatch([packs], denominator)], 1.0)


async def chain_log_probs(trainer: TrainerGroup, tokens: np.ndarray) -> np.ndarray:
    """The trainer's log-probs of a chain of tokens, without the first token."""
    zeros = np.zeros(len(tokens) - 1, dtype=np.int32)
    segment = Segment(PROMPT, tokens[1:], zeros.astype(np.float32), zeros, Finish.LENGTH)
    tree = Tree("chain", tokens[:1], (segment,), (Leaf(0, Stop.EOS, 1.0, Verdict.CORRECT),))
    (packs,) = pack_trees([tree], advantage.estimate([tree], LearningConfig()), 512, 1)
    return (await trainer.log_probs([packs], 1.0))[0][0][1:]


async def assert_serve(
    engines: Sequence[RayEngine], version: int, trainer: TrainerGroup, old: np.ndarray
) -> None:
    """The engines have the trainer's weights, which differ from those that gave `old`."""
    expected = await chain_log_probs(trainer, TOKENS)
    assert np.abs(expected - old).max() > 10 * TOLERANCE
    for engine in engines:
        assert (await engine.generate(REQUEST)).version == version
        np.testing.assert_allclose(await engine.actor.log_probs.remote(TOKENS), expected, atol=TOLERANCE)


class SwitchingRank(TrainerRank):
    """A trainer rank whose transport can change between updates."""

    def use_transport(self, transport: Transport) -> None:
        weights = self._config.weights.model_copy(update={"transport": transport})
        self._config = self._config.model_copy(update={"weights": weights})
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def shares(self) -> list[float]:
        """The share of this lane's bytes that each group of engine ranks reads, by `broadcast`."""
        share = self._trainer.weight_source().share
        assert self._stream is not None
        return [read_bytes(share, shards) / read_bytes(share, None) for shards in self._stream._readers]

    def pid(self) -> int:
        return os.getpid()


class FaultyEngine(HostedEngine):
    """An engine that kills processes while the second bucket of an update arrives."""

    _victims: tuple[int, ...] = ()
    _loads = 0

    def at_second_bucket_kill(self, *pids: int) -> None:
        self._victims, self._loads = pids, 0

    def children(self) -> list[int]:
        return [child.pid for child in psutil.Process().children(recursive=True)]

    async def load(self, buckets: Sequence[Bucket | None]) -> None:
        self._loads += 1
        if self._loads == 2:
            for pid in self._victims:
                os.kill(pid, signal.SIGKILL)
        await super().load(buckets)


@pytest.mark.parametrize(
    ("tensor", "send", "transports"),
    [(1, "merged", TRANSPORTS), (1, "adapter", TRANSPORTS), (2, "merged", ("broadcast", "colocated"))],
)
def test_every_transport_and_deaths(
    tensor: int,
    send: str,
    transports: Sequence[Transport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """tensor: ranks of each engine. By `broadcast` each of them gets its shards only."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # Ray's workers import this file
    monkeypatch.setattr(trainer_group, "TrainerRank", SwitchingRank)
    monkeypatch.setattr(ray_engine, "HostedEngine", FaultyEngine)
    write_tiny_qwen2(
        tmp_path / "model", vocab_size=VOCABULARY, hidden_size=128, intermediate_size=512, eos_token_id=1
    )
    asyncio.run(_scenario(tmp_path, config_of(tmp_path, tensor, send), transports))


async def _scenario(folder: Path, config: RunConfig, transports: Sequence[Transport]) -> None:
    async with AsyncExitStack() as stack:
        stack.enter_context(ray_session(4 + 2 * config.engine.tensor, folder))
        reservation = await reserve(config, 60)
        devices = EngineDevices(reservation.engine_options([]), may_move=True, seconds=60)
        rule = StopRule(SamplingConfig(), str)
        launcher = EngineLauncher(config, rule, devices, shares_devices=False, lora=config.served_lora)
        pool = EnginePool(launcher, config.engine)
        stack.push_async_callback(pool.close)
        trainer = TrainerGroup(config, reservation.ranks)
        await asyncio.gather(pool.ready(), trainer.ready())
        engines = [engine.process for engine in pool.engines]
        for rank in trainer._ranks:  # Ray would make its workers give way to every other process
            assert psutil.Process(await rank.pid.remote()).nice() == psutil.Process().nice()
        for version, transport in enumerate(transports, start=1):
            await use_transport(trainer, transport)
            old = await chain_log_probs(trainer, TOKENS)
            await take_step(trainer)
            assert await update_weights(trainer, engines, version, 60) == {}
            await assert_serve(engines, version, trainer, old)
            if transport == "broadcast":
                for rank in trainer._ranks:  # each has a lane, and each rank of an engine reads its part
                    shares = await rank.shares.remote()
                    assert len(shares) == config.engine.tensor
                    assert max(shares) < 1.2 / config.engine.tensor

        dying = engines[1].actor
        await dying.at_second_bucket_kill.remote(*await dying.children.remote())
        await use_transport(trainer, "broadcast")
        old = await chain_log_probs(trainer, TOKENS)
        await take_step(trainer)
        failed = await update_weights(trainer, engines, 5, 60)
        assert list(failed) == [engines[1]]
        assert "ended" in str(failed[engines[1]])
        await assert_serve(engines[:1], 5, trainer, old)

        await engines[0].actor.at_second_bucket_kill.remote(await trainer._ranks[0].pid.remote())
        with pytest.raises(TrainerError, match="rank 0"):
            await update_weights(trainer, engines[:1], 6, 60)
        with pytest.raises(EngineError, match="incomplete"):
            await engines[0].generate(REQUEST)
        assert not (folder / "run" / "weights" / ".partial").exists()


async def use_transport(trainer: TrainerGroup, transport: Transport) -> None:
    await asyncio.gather(*(rank.use_transport.remote(transport) for rank in trainer._ranks))
