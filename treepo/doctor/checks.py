"""All checks in the order in which they run. A check is a function without arguments that returns an Outcome;
to add one, write it and name it here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from treepo.errors import ConfigError

_NOT_ITSELF = "see the lines that it printed"
_SYSTEM = "the system does not answer: look for a mount that hangs, or a machine that is overloaded"
_DRIVER = "see whether nvidia-smi answers; where it does not, the driver or a device is at fault"


@dataclass(frozen=True, slots=True)
class Check:
    """place: module:function. seconds: its deadline. remedy: what to do where it hangs, crashes, or fails
    without saying what to do. long: whether --quick leaves it out.
    """

    name: str
    place: str
    seconds: float
    remedy: str
    long: bool = False


CHECKS = (
    Check("python", "treepo.doctor.software:python", 30, _SYSTEM),
    Check("packages", "treepo.doctor.software:packages", 60, _SYSTEM),
    Check("devices", "treepo.doctor.devices:devices", 120, _DRIVER),
    Check("driver", "treepo.doctor.devices:driver", 120, _DRIVER),
    Check(
        "transformer engine",
        "treepo.doctor.software:transformer_engine",
        120,
        "it is installed and cannot be imported: build it again for this torch, or remove it",
    ),
    Check("shared memory", "treepo.doctor.host:shared_memory", 30, _SYSTEM),
    Check("open files", "treepo.doctor.host:open_files", 30, _SYSTEM),
    Check("locked memory", "treepo.doctor.host:locked_memory", 30, _SYSTEM),
    Check("memory", "treepo.doctor.host:memory", 30, _SYSTEM),
    Check("disk", "treepo.doctor.host:disk", 30, _SYSTEM),
    Check(
        "loopback", "treepo.doctor.network:loopback", 30, "nothing may listen on 127.0.0.1: see the firewall"
    ),
    Check(
        "host name",
        "treepo.doctor.network:host_name",
        30,
        "the name server does not answer: give this host a line in /etc/hosts",
    ),
    Check(
        "gloo",
        "treepo.doctor.collective:gloo",
        120,
        "set GLOO_SOCKET_IFNAME to the interface that other ranks reach, and see the firewall",
        long=True,
    ),
    Check(
        "nccl",
        "treepo.doctor.collective:nccl",
        180,
        "run with NCCL_DEBUG=INFO; NCCL_SOCKET_IFNAME names the interface, and NCCL_IB_DISABLE=1 or "
        "NCCL_P2P_DISABLE=1 tell which link is at fault",
        long=True,
    ),
    Check("engine", "treepo.doctor.engine:engine", 600, _NOT_ITSELF, long=True),
    Check("trainer", "treepo.doctor.trainer:trainer", 300, _NOT_ITSELF, long=True),
)


def chosen(names: Sequence[str] | None) -> Sequence[Check]:
    """Those with the names, all where none is given. Raises ConfigError for a name that no check has."""
    known = {check.name: check for check in CHECKS}
    for name in names or ():
        if name not in known:
            raise ConfigError(f"--only: no check is named {name!r}; there are {', '.join(known)}")
    return [known[name] for name in names] if names else CHECKS
