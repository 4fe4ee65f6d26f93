"""Which network interface gloo uses between nodes."""

import os

import psutil
import ray


def use_interface_of_node() -> None:
    """In a Ray actor, before any process group: gloo listens on the interface of the address by which Ray
    reaches this node, unless GLOO_SOCKET_IFNAME says otherwise.

    By itself it asks what address the machine's own name has, which on many systems is a loopback address.
    NCCL needs no such help: it never takes the loopback where there is another.
    """
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:  # a node may be reached by an address that is translated on the way
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_of(address: str) -> str | None:
    """The name of this machine's interface that has the address."""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, has in interfaces if address in [entry.address for entry in has]), None)
