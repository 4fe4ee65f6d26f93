"""The check `engine`, on fake engines that compute right or wrong, take new weights or do not."""

import asyncio
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.weight_sinks import reads_all
from treepo.doctor.check import Status
from treepo.doctor.engine_check import sample_and_update
from treepo.doctor.toy_model import Toy, max_difference
from treepo.errors import EngineError
from treepo.weight_sync.receive import RankReceiver
from treepo.weight_sync.wire import Address, Bucket, Manifest


class FakeEngine:
    """Computes log-probs with the toy's weights.

    off: added to every log-prob. takes: whether it serves the new weights ("all"), keeps the old ones
    ("none"), or rejects the first bucket ("refuses").
    """

    def __init__(self, toy: Toy, *, off: float = 0.0, takes: str = "all") -> None:
        self.version = 0
        self._toy, self._off, self._takes = toy, off, takes
        self._loaded: dict[str, Tensor] = {}
        self._receiver = RankReceiver()

    async def generate(self, request: Any) -> Any:
        return SimpleNamespace(tokens=[0] * request.max_tokens, version=self.version)

    async def log_probs(self, tokens: np.ndarray) -> np.ndarray:
        return self._toy.log_probs(tokens, new=self.version == 1 and self._takes != "none") + self._off

    async def begin(self, version: int, manifest: Manifest) -> None:
        assert version == 1
        self._names = {info.name for info in manifest}

    async def join(self, addresses: Sequence[Address]) -> None:
        self._receiver.join(addresses, 0, torch.device("cpu"), reads_all)

    async def load(self, buckets: Sequence[Bucket | None]) -> None:
        if self._takes == "refuses":
            raise EngineError("a bucket is torn")
        self._receiver.load(buckets, self._keep)

    def _keep(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self._loaded |= {name: tensor.clone() for name, tensor in tensors}

    async def commit(self) -> None:
        assert set(self._loaded) == self._names
        for name, tensor in self._toy.new_weights().items():
            assert tensor.equal(self._loaded[name])
        self.version = 1


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("toy"), "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_of_an_update_change_log_probs_by_far_more_than_the_tolerance(
    dtype: str, tmp_path: Path
) -> None:
    toy = Toy(tmp_path, dtype)
    change = max_difference(toy.log_probs(toy.tokens), toy.log_probs(toy.tokens, new=True))
    assert change > 10 * toy.tolerance


@pytest.mark.parametrize(
    ("engine", "found"),
    [
        ({}, ""),
        ({"off": 1e-3}, "log-probs differ"),
        ({"off": math.nan}, "log-probs differ"),
        ({"takes": "none"}, "after a weight sync"),
        ({"takes": "refuses"}, "a bucket is torn"),
    ],
)
def test_an_engine_passes_if_it_computes_right_before_and_after_an_update(
    engine: dict[str, Any], found: str, toy: Toy
) -> None:
    outcome = asyncio.run(sample_and_update(FakeEngine(toy, **engine), toy))  # type: ignore[arg-type]  # a fake
    assert (outcome.status is Status.FAIL) == bool(found)
    assert found in outcome.found
