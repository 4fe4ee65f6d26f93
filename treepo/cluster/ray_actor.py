"""Network interface and errors of Ray actors, for engines and trainer ranks alike."""

import os

import psutil
import ray
from ray.exceptions import RayActorError, RayTaskError

from treepo.cluster.actor_death import death_without_lines
from treepo.errors import TreepoError

_LOOPBACK = "lo"  # Linux's name


def use_interface_of_node() -> None:
    """Make gloo listen on the interface by whose address Ray reaches this node. GLOO_SOCKET_IFNAME overrides.

    For a Ray actor, before any process group. By default gloo takes the address of the hostname, which on
    many systems is a loopback address. NCCL chooses an interface by itself, but loopback only if it is told
    to: NCCL_SOCKET_IFNAME overrides.
    """
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:  # the address may be translated between the nodes, so that no interface has it
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    if name == _LOOPBACK:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def interface_of(address: str) -> str | None:
    """The name of this machine's network interface that has the address."""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, has in interfaces if address in [entry.address for entry in has]), None)


def own_error(error: BaseException, death: type[TreepoError]) -> BaseException:
    """Translate Ray's error to the TreepoError that was raised in the actor, or to `death` if the actor died.

    Any other error stays as it is, because it is a bug and needs its traceback.
    """
    if isinstance(error, RayTaskError) and isinstance(error.cause, TreepoError):
        return error.cause
    if isinstance(error, RayActorError):
        return death(death_without_lines(error))
    return error
