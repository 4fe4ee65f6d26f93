"""The broadcast between devices forms its NCCL group before the first bucket, and no watchdog of torch ends a
process that loses it. A stand-in behaves like NCCL where no GPU is needed.
"""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.weight_sinks import reads_all
from treepo.weight_sync.broadcast import BroadcastSender, form_group
from treepo.weight_sync.listening_store import listening_store
from treepo.weight_sync.wire import TensorInfo

SECONDS = 20.0  # for a step: far more than any takes
SHARE = (TensorInfo("x", "uint8", (8,)),)
META = torch.device("meta")  # not the CPU, and there on every machine


class Work:
    def wait(self, timeout: object) -> None:
        del timeout


class FakeNCCL:
    """Connects in its first collective, which returns when all ranks have begun theirs."""

    class Options:
        _timeout: Any

    made: list["FakeNCCL"]
    connected: threading.Barrier

    def __init__(self, store: object, rank: int, size: int, options: Options) -> None:
        del store, options
        self.rank, self.size = rank, size
        self.blocking_wait = os.environ.get("TORCH_NCCL_BLOCKING_WAIT")
        self.collectives = 0
        self.made.append(self)

    def broadcast(self, tensors: list[torch.Tensor], options: object) -> Work:
        del options
        assert tensors[0].device == META
        if not self.collectives:
            self.connected.wait(SECONDS)
        self.collectives += 1
        return Work()


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeNCCL]]:
    monkeypatch.delenv("TORCH_NCCL_BLOCKING_WAIT", raising=False)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", FakeNCCL)
    FakeNCCL.made, FakeNCCL.connected = [], threading.Barrier(3)
    yield FakeNCCL
    FakeNCCL.connected.abort()


def test_a_bucket_begins_before_the_receivers_learn_of_it(nccl: type[FakeNCCL]) -> None:
    """They learn of it by a call that is made afterwards, so a connection that waits for them hangs."""
    sender = BroadcastSender(META, "127.0.0.1", SECONDS)
    (address,) = sender.addresses([2])
    with ThreadPoolExecutor(2) as ranks:
        joining = [ranks.submit(address.join, rank, META, reads_all) for rank in range(2)]
        sender.connect(SHARE)
        receivers = [one.result(SECONDS) for one in joining]
    before = time.monotonic()
    sender.start(0, sender.buffer(0, 8), SHARE)
    assert time.monotonic() - before < SECONDS / 2
    assert {group.rank for group in nccl.made} == {0, 1, 2}
    assert len(receivers) == 2
    sender.finish()


def test_no_watchdog_watches_the_group(nccl: type[FakeNCCL]) -> None:
    nccl.connected = threading.Barrier(1)
    store = listening_store("127.0.0.1", timedelta(seconds=SECONDS))
    form_group(store, "alone", 0, 1, SECONDS, META)
    assert nccl.made[0].blocking_wait == "1"
    assert "TORCH_NCCL_BLOCKING_WAIT" not in os.environ, "torch's own groups keep theirs"


def test_nothing_connects_to_a_rank_that_does_not_come(nccl: type[FakeNCCL]) -> None:
    """NCCL waits for it without a deadline."""
    sender = BroadcastSender(META, "127.0.0.1", 0.2)
    sender.addresses([1])
    with pytest.raises(RuntimeError):
        sender.connect(SHARE)
    assert not nccl.made
