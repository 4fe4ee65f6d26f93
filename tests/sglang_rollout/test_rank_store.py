"""The store of an engine's ranks: its port is taken from the start, and ranks meet there."""

import socket
from datetime import timedelta

import pytest
from torch.distributed import TCPStore  # type: ignore[reportPrivateImportUsage]  # documented there
from torch.distributed.rendezvous import rendezvous

from sglang_rollout.rank_store import LOOPBACK, Meeting, open_store, store_variables
from treepo.weight_sync.listening_store import listening_store


def test_ranks_meet_at_a_port_that_nobody_else_can_take(monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(LOOPBACK)
    with pytest.raises(OSError, match="in use"):
        socket.create_server(("127.0.0.1", store.port))
    for name, value in store_variables(Meeting(LOOPBACK, store.port, share=0)).items():
        monkeypatch.setenv(name, value)
    first, second = (next(iter(rendezvous("env://", rank, 2)))[0] for rank in range(2))
    first.set("a", "b")
    assert second.get("a") == b"b"
    assert open_store(LOOPBACK).port != store.port


def test_a_store_may_be_at_an_ipv6_address() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("the machine has no IPv6")
    patience = timedelta(seconds=60)
    store = listening_store("::1", patience)
    TCPStore("::1", store.port, None, False, patience).set("a", "b")
    assert store.get("a") == b"b"
