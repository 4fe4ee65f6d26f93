"""Devices as their makers describe them: rates are peaks, and `efficiency` is the part that is planned with.

Units: bytes, bytes per second, floating-point operations per second (bfloat16, dense).
Sources: NVIDIA's data sheets of A100, H100 SXM, H200 SXM and B200 (HGX).
"""

import os
from dataclasses import dataclass

from treepo.planning.cgroup import cgroup_room

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Device:
    """memory: that a process can allocate. link: to one other device of its node, one direction.

    efficiency: of matrix products, as large as they are in a layer, over their peak; memory_efficiency: of
    reading weights and caches, over the peak. pass_seconds: of an engine's forward pass, besides those.
    """

    name: str
    memory: float
    flops: float
    memory_bandwidth: float
    link: float
    efficiency: float = 0.4
    memory_efficiency: float = 0.8
    pass_seconds: float = 1e-3


DEVICES = {
    device.name: device
    for device in (
        Device("a100-40gb", 39 * GIB, 312e12, 1.55e12, 300e9),
        Device("a100-80gb", 79 * GIB, 312e12, 2.04e12, 300e9),
        Device("h100", 79 * GIB, 989e12, 3.35e12, 450e9),
        Device("h200", 139 * GIB, 989e12, 4.8e12, 450e9),
        Device("b200", 178 * GIB, 2250e12, 7.7e12, 900e9),
    )
}


def this_machine() -> Device:
    """The CPU, all of whose processes share its memory. Rates of one core of a common server, in float32."""
    memory = min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *cgroup_room()])
    return Device("cpu", memory, 50e9, 10e9, 2e9, pass_seconds=4e-3)


def device(name: str) -> Device:
    """The device that `plan.device` names."""
    return this_machine() if name == "cpu" else DEVICES[name]
