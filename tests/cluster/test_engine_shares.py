"""A real engine of two shares in Ray actors: it serves, takes weights, and is restarted when a share dies."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.paths import ROOT
from treepo.config.rollout import RolloutConfig
from treepo.config.weights import WeightsConfig
from treepo.protocols import GenerateRequest
from treepo.rollout.stopping import StopRule
from treepo.weight_sync.send import WeightStream, open_sender

CONTEXT = np.arange(20, 50, dtype=np.int32)
REQUEST = GenerateRequest(context=CONTEXT, prompt_tokens=30, max_tokens=16, temperature=1.0, seed=0)


def test_whatever_keeps_a_share_from_starting_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the call that starts it."""
    from sglang_rollout.rank_store import LOOPBACK, Meeting
    from treepo.cluster import engine_share

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine_share, "note_start", lambda: None)
    monkeypatch.setattr(engine_share, "use_interface_of_node", lambda: None)
    monkeypatch.setattr(engine_share, "SGLangProcesses", full_disk)

    async def scenario() -> None:
        share = engine_share.HostedShare()
        share.start(Meeting(LOOPBACK, 1, share=1))
        for waiting in (share.ready(), share.died()):
            with pytest.raises(OSError, match="No space left"):
                await waiting
        share.close()

    asyncio.run(scenario())


@pytest.mark.slow
def test_an_engine_of_two_shares_lives_and_dies_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both shares are on this machine; their ranks are pipeline stages, which hold different weights."""
    from transformers import Qwen2ForCausalLM

    from tests.cluster.test_engine_death import FakeTrainer
    from tests.support.real_engine import perturbed, write_model
    from treepo.cluster.engine_devices import EngineDevices
    from treepo.cluster.pooled_engine import State
    from treepo.cluster.ray_engine import EngineLauncher
    from treepo.cluster.reservation import unreserved_engines
    from treepo.cluster.session import ray_session
    from treepo.cluster.training_engine_pool import TrainingEnginePool

    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for Ray's workers
    config = RolloutConfig.model_validate(
        {
            "out": "unused",
            "model": {"path": str(write_model(tmp_path)), "dtype": "float32"},
            "data": {"prompts": "unused.jsonl"},
            "engine": {"pipeline": 2, "nodes": 2, "max_total_tokens": 20_000},
        }
    )
    torch.manual_seed(0)
    reference = Qwen2ForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    weights = {name: tensor.clone() for name, tensor in perturbed(reference).items()}
    reference.load_state_dict(weights)
    trainer = FakeTrainer(weights, tmp_path)
    sender = open_sender(WeightsConfig(transport="host_broadcast"), tmp_path, "127.0.0.1", 60)
    trainer._stream = WeightStream(sender, 1 << 18, 60)

    async def check(engine: Any) -> None:
        output = await engine.generate(REQUEST)
        assert output.version == 1
        path = torch.tensor([[*CONTEXT, *output.tokens]])
        with torch.no_grad():
            log_probs = reference(path).logits[0].log_softmax(-1)
        expected = log_probs[len(CONTEXT) - 1 : -1].gather(1, path[0, len(CONTEXT) :, None])[:, 0]
        np.testing.assert_allclose(output.log_probs, expected.numpy(), atol=1e-5)  # as in test_engine.py

    async def scenario() -> None:
        devices = EngineDevices(unreserved_engines(config.engine), may_move=True, seconds=60)
        launcher = EngineLauncher(config, StopRule(config.sampling, str), devices, shares_devices=False)
        pool = TrainingEnginePool(
            launcher, config.engine, trainer, shares_devices=False, sampling_goes_on=False
        )
        try:
            await pool.ready()
            (engine,) = pool.engines
            async with pool.training():
                await pool.sync_weights(1)
            await check(engine)
            (share,) = engine.process._further
            (rank,) = await share.actor.__ray_call__.remote(
                lambda hosted: [child.pid for child in hosted._processes._children]
            )
            before = engine.process
            os.kill(rank, signal.SIGKILL)
            while engine.state is State.SERVING:
                await asyncio.sleep(0.01)
            await check(engine)  # waits for the engine's next process
            assert engine.state is State.SERVING
            assert engine.process is not before
            assert pool.restarts == 1
        finally:
            await pool.close()

    with ray_session(2, tmp_path):
        asyncio.run(scenario())
