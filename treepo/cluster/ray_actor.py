"""Network interface, options and errors of Ray actors, for engines and trainer ranks alike."""

import logging
import os
import re

import psutil
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from treepo.cluster.actor_death import death_without_lines
from treepo.errors import ActorError, TreepoError, one_line, without_colors

_log = logging.getLogger(__name__)
_PROCESS = re.compile(r"\(pid=(\d+), ip=([^,)]+)")

_LOOPBACK = "lo"  # Linux's name
UNRECORDED = {"enable_task_events": False}
"""Ray's option of an actor whose calls the GCS does not record: at thousands a second it would grow for long,
and `ray list tasks` shows nothing that the log does not.
"""


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

    Any other error of the actor becomes an ActorError of one line, and the log gets its traceback.
    """
    if isinstance(error, RayActorError):
        return death(death_without_lines(error))
    if not isinstance(error, RayTaskError):
        return error
    if isinstance(error.cause, TreepoError):
        return error.cause
    _log.error("an error that was not expected in an actor:\n%s", without_colors(str(error)))
    return ActorError(f"{_said(error)} ({_process(error)}; its traceback is in the log)")


def _process(error: RayTaskError) -> str:
    """The actor's process. An error that also has the type of its cause names it in its text alone."""
    if isinstance(error, type(error.cause)):
        named = _PROCESS.search(str(error))
        return f"process {named[1]} on {named[2]}" if named else "its process is not known"
    return f"process {error.pid} on {error.ip}"


def _said(error: RayTaskError) -> str:
    """Type and message of the actor's error. Ray keeps only its text if it cannot be pickled."""
    if error.cause is not None and not isinstance(error.cause, RayError):
        return one_line(f"{type(error.cause).__name__}: {error.cause}")
    lines = without_colors(error.traceback_str).strip().splitlines()
    return one_line(lines[-1]) if lines else type(error).__name__
