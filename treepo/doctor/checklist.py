"""Every check of `treepo doctor`, in the order in which they run.

To add a check, write its function and name it here.
"""

from collections.abc import Sequence

from treepo.doctor.check import Check
from treepo.errors import ConfigError

_READ_OUTPUT = "see its output below"
_SYSTEM = "the system does not respond: look for a mount that hangs or an overloaded machine"
_DRIVER = "run nvidia-smi: if it does not respond either, the driver or a device is at fault"

CHECKS = (
    Check("python", "treepo.doctor.software:python", 30, _SYSTEM),
    Check("packages", "treepo.doctor.software:packages", 60, _SYSTEM),
    Check("devices", "treepo.doctor.devices:devices", 120, _DRIVER),
    Check("driver", "treepo.doctor.devices:driver", 120, _DRIVER),
    Check("CUDA IPC", "treepo.doctor.devices:cuda_ipc", 120, _DRIVER, slow=True),
    Check(
        "transformer engine",
        "treepo.doctor.software:transformer_engine",
        120,
        "it is installed but cannot be imported: build it again for this torch, or uninstall it",
    ),
    Check("cuda toolkit", "treepo.doctor.cuda_toolkit:cuda_toolkit", 300, _READ_OUTPUT),
    Check("memory saver", "treepo.doctor.cuda_toolkit:memory_saver", 120, _READ_OUTPUT),
    Check("shared memory", "treepo.doctor.host:shared_memory", 30, _SYSTEM),
    Check("open files", "treepo.doctor.host:open_files", 30, _SYSTEM),
    Check("locked memory", "treepo.doctor.host:locked_memory", 30, _SYSTEM),
    Check("memory", "treepo.doctor.host:memory", 30, _SYSTEM),
    Check("disk", "treepo.doctor.host:disk", 30, _SYSTEM),
    Check(
        "loopback",
        "treepo.doctor.network:loopback",
        30,
        "no process can listen on 127.0.0.1: check the firewall",
    ),
    Check(
        "host name",
        "treepo.doctor.network:host_name",
        30,
        "the name server does not respond: add this host to /etc/hosts",
    ),
    Check(
        "gloo",
        "treepo.doctor.network:gloo",
        120,
        "set GLOO_SOCKET_IFNAME to the interface that other ranks reach, and check the firewall",
        slow=True,
    ),
    Check(
        "nccl",
        "treepo.doctor.network:nccl",
        180,
        "run with NCCL_DEBUG=INFO; NCCL_SOCKET_IFNAME selects the interface; NCCL_IB_DISABLE=1 or "
        "NCCL_P2P_DISABLE=1 shows which link is at fault",
        slow=True,
    ),
    Check("engine", "treepo.doctor.engine_check:engine", 600, _READ_OUTPUT, slow=True),
    Check("trainer", "treepo.doctor.trainer_check:trainer", 300, _READ_OUTPUT, slow=True),
    Check("routing", "treepo.doctor.routing_check:routing", 300, _READ_OUTPUT, slow=True),
)


def select_checks(names: Sequence[str] | None) -> Sequence[Check]:
    """The checks with these names; all of them if none is given. Raises ConfigError for an unknown name."""
    known = {check.name: check for check in CHECKS}
    for name in names or ():
        if name not in known:
            raise ConfigError(f"--only: no check is named {name!r}; there are {', '.join(known)}")
    return [known[name] for name in names] if names else CHECKS
