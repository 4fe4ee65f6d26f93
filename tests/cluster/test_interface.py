"""Which network interface an actor's collectives listen on."""

import os

import pytest

from treepo.cluster import ray_actor

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.mark.parametrize(
    ("address", "interfaces"),
    [("127.0.0.1", ("lo", "lo")), ("203.0.113.7", (None, None))],
    ids=["one machine", "an address that no interface has"],
)
@pytest.mark.parametrize("user", [None, "mine"])
def test_on_one_machine_it_is_loopback(
    address: str,
    interfaces: tuple[str | None, str | None],
    user: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, user or "")  # to be restored
        if user is None:
            monkeypatch.delenv(name)
    monkeypatch.setattr(ray_actor.ray.util, "get_node_ip_address", lambda: address)
    ray_actor.use_interface_of_node()
    expected = interfaces if user is None else (user, user)
    assert tuple(os.environ.get(name) for name in VARIABLES) == expected
