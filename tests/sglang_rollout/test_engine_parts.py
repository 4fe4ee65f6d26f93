"""The parts around the SGLang engine that need no engine: the gate, the checks of weights, the end tokens."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sglang_rollout.preflight import check_engine
from sglang_rollout.request_gate import Gate
from sglang_rollout.tensor_parallel import check_tensor
from sglang_rollout.weights import check_manifest, check_names, checkpoint_shapes
from treepo.config.engine import EngineConfig
from treepo.errors import ConfigError, EngineError, ModelError
from treepo.weight_sync.wire import TensorInfo


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_shut_gate_holds_requests_back_until_it_opens_or_refuses() -> None:
    async def scenario() -> None:
        gate = Gate()
        log: list[str] = []

        async def request(name: str, end: asyncio.Event) -> None:
            async with gate.passage():
                log.append(f"{name} in")
                await end.wait()

        end = asyncio.Event()
        first = asyncio.ensure_future(request("first", end))
        await settle()
        gate.shut()
        second = asyncio.ensure_future(request("second", end))
        emptied = asyncio.ensure_future(gate.empty())
        await settle()
        assert log == ["first in"]
        assert not emptied.done()
        end.set()
        await first
        await emptied
        assert not second.done()
        gate.refuse("half a model")
        with pytest.raises(EngineError, match="half a model"):
            await second
        gate.open()
        await request("third", end)
        assert log == ["first in", "third in"]
        await gate.empty()

    asyncio.run(scenario())


def test_a_cancelled_request_leaves_the_gate_empty() -> None:
    async def scenario() -> None:
        gate = Gate()

        async def request() -> None:
            async with gate.passage():
                await asyncio.Event().wait()

        inside = asyncio.ensure_future(request())
        await settle()
        gate.shut()
        waiting = asyncio.ensure_future(request())
        await settle()
        for task in (inside, waiting):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await asyncio.wait_for(gate.empty(), timeout=5)

    asyncio.run(scenario())


def test_arrived_names_must_be_the_expected_ones_each_once() -> None:
    check_names(["b", "a"], ["a", "b"], "the model's")
    with pytest.raises(EngineError, match=r"the model's 3 tensors .*2 missing: a, c"):
        check_names(["b"], ["a", "b", "c"], "the model's")
    with pytest.raises(EngineError, match=r"1 unexpected: x; 1 repeated: a"):
        check_names(["a", "x", "a"], ["a"], "the model's")
    with pytest.raises(EngineError, match=r"9 missing: 0, 1, 2, 3, 4 and 4 more$"):
        check_names([], [str(n) for n in range(9)], "the model's")


def test_a_manifest_must_be_the_models_own(tmp_path: Path) -> None:
    save_file({"a": np.zeros((2, 3), dtype=np.float32)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": np.zeros(4, dtype=np.float32)}, tmp_path / "model-00002-of-00002.safetensors")
    save_file({"lm_head.weight": np.zeros(4, dtype=np.float32)}, tmp_path / "model-3.safetensors")
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    shapes = checkpoint_shapes(tmp_path)
    assert shapes == {"a": (2, 3), "b": (4,)}, "a tied output layer is no tensor of its own"
    a, b = TensorInfo("a", "float32", (2, 3)), TensorInfo("b", "float32", (4,))
    check_manifest((b, a), shapes)
    with pytest.raises(EngineError, match="1 missing: b"):
        check_manifest((a,), shapes)
    with pytest.raises(EngineError, match=r"a has shape \(3, 2\), the model's is \(2, 3\)"):
        check_manifest((replace(a, shape=(3, 2)), b), shapes)


@pytest.mark.parametrize(
    ("heads", "groups", "fit"),
    [(28, 4, [1, 2, 4]), (64, 8, [1, 2, 4, 8, 16]), (14, 2, [1, 2, 14]), (12, None, [1, 2, 3, 4, 6, 12])],
)
def test_a_model_is_divided_only_among_equal_ranks(
    tmp_path: Path, heads: int, groups: int | None, fit: list[int]
) -> None:
    config = {"num_attention_heads": heads} | ({"num_key_value_heads": groups} if groups else {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    for tensor in range(1, 17):
        if tensor in fit:
            check_tensor(tmp_path, tensor)
        else:
            with pytest.raises(ConfigError, match=f"engine.tensor = {tensor}: .* {heads} attention heads"):
                check_tensor(tmp_path, tensor)


def test_a_folder_without_weights_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="safetensors"):
        checkpoint_shapes(tmp_path)


@pytest.mark.parametrize(
    ("layers", "refused"),
    [
        ({}, None),
        ({"mlp_only_layers": [], "decoder_sparse_step": 1}, None),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
    ],
)
def test_an_architecture_that_sglang_would_serve_otherwise_is_refused(
    tmp_path: Path, layers: dict[str, object], refused: str | None
) -> None:
    save_file({"a": np.zeros(1, dtype=np.float32)}, tmp_path / "model.safetensors")
    config = {"model_type": "qwen3_moe", "num_attention_heads": 4, "max_position_embeddings": 1024}
    (tmp_path / "config.json").write_text(json.dumps(config | layers))
    if refused is None:
        check_engine(tmp_path, prompt=100, response=100, engine=EngineConfig())
        return
    with pytest.raises(ModelError, match=refused):
        check_engine(tmp_path, prompt=100, response=100, engine=EngineConfig())
