"""Ranks report through the store where they met; the process that gave the command waits for all of them."""

import asyncio

import pytest
from torch.distributed import TCPStore  # type: ignore[reportPrivateImportUsage]  # documented there

from sglang_rollout.rank_store import LOOPBACK, Meeting, connect_to_store, open_store, store_variables
from sglang_rollout.receipts import Receipts
from treepo.errors import EngineError, TransportError
from treepo.weight_sync.shared_memory import Report

DONE = Report("done")


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> tuple[TCPStore, TCPStore]:
    """The engine's own, and a rank's connection to it."""
    store = open_store(LOOPBACK)
    for name, value in store_variables(Meeting(LOOPBACK, store.port, share=1)).items():
        monkeypatch.setenv(name, value)
    return store, connect_to_store()


def test_a_command_is_done_when_all_ranks_have_reported(stores: tuple[TCPStore, TCPStore]) -> None:
    store, of_rank = stores

    async def scenario() -> None:
        receipts = Receipts.next(store, 3)
        checking = asyncio.create_task(receipts.check(store))
        for rank in (2, 0, 1):
            await asyncio.sleep(0.02)
            assert not checking.done()
            receipts.write(of_rank, rank, DONE)
        await checking

    asyncio.run(scenario())
    # As after a command whose deadline has passed: a late report is not one of the next command.
    late, following = Receipts.next(store, 1), Receipts.next(store, 1)
    late.write(of_rank, 0, Report("weights", "late"))
    following.write(of_rank, 0, DONE)
    asyncio.run(following.check(store))


@pytest.mark.parametrize(("kind", "error"), [("transport", TransportError), ("weights", EngineError)])
def test_a_failure_names_its_rank(
    stores: tuple[TCPStore, TCPStore], kind: str, error: type[EngineError]
) -> None:
    store, of_rank = stores
    receipts = Receipts.next(store, 2)
    receipts.write(of_rank, 0, DONE)
    receipts.write(of_rank, 1, Report(kind, "läuft nicht"))
    with pytest.raises(error, match="rank 1: läuft nicht"):
        asyncio.run(receipts.check(store))


def test_the_rank_at_fault_is_named_before_those_that_waited_for_it(
    stores: tuple[TCPStore, TCPStore],
) -> None:
    store, of_rank = stores
    receipts = Receipts.next(store, 3)
    for rank, kind in enumerate(("transport", "done", "weights")):
        receipts.write(of_rank, rank, Report(kind, kind))
    with pytest.raises(EngineError, match="rank 2: weights") as raised:
        asyncio.run(receipts.check(store))
    assert not isinstance(raised.value, TransportError)
