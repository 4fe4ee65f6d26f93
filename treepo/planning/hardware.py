"""Devices and the machines around them: memory, peak rates, and the share of a peak that a plan counts on.

Peaks are those of NVIDIA's data sheets (A100, H100 SXM, H200 SXM, B200 HGX), in bfloat16 without sparsity.
Measured on one H200 (2026-11-27): an 8192^3 matrix product 785e12 FLOP/s (79% of the peak), a copy on the
device 3989e9 bytes/s read and written (83%), and the copies between device and host below. A whole train step
of a 0.5B model reached 16 to 20% of the peak on packed trees and 23% on flat trajectories: `efficiency` is
too high for models that small.

Units: bytes, bytes per second, floating-point operations per second.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30

TO_HOST, FROM_HOST = 14.8e9, 8.4e9
"""Copies between a GPU and pageable memory of its host. Measured on an H200, PCIe 5, 2026-11-27."""
FILE_SYSTEM = 5e9
"""A shared file system, written and read. Assumed."""
GLOO = 2e9
"""Gloo from one host to another; its broadcasts pass through a binary tree, hop by hop. Assumed."""

_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class Device:
    """One kind of device.

    memory: what a process can allocate. link: to another device of the node, one direction. pinned: to and
    from pinned memory of the host, one direction. efficiency: of a layer's matrix products over the peak.
    memory_efficiency: of reading weights and KV cache over the peak. pass_seconds: what an engine's forward
    pass takes besides those.
    """

    name: str
    memory: float
    flops: float
    memory_bandwidth: float
    link: float
    pinned: float
    efficiency: float = 0.4
    memory_efficiency: float = 0.8
    pass_seconds: float = 1e-3


DEVICES = {
    device.name: device
    for device in (
        Device("a100-40gb", 39 * GIB, 312e12, 1.55e12, 300e9, pinned=25e9),  # PCIe 4
        Device("a100-80gb", 79 * GIB, 312e12, 2.04e12, 300e9, pinned=25e9),
        Device("h100", 79 * GIB, 989e12, 3.35e12, 450e9, pinned=55e9),  # PCIe 5, measured on an H200
        Device("h200", 139 * GIB, 989e12, 4.8e12, 450e9, pinned=55e9),
        Device("b200", 178 * GIB, 2250e12, 7.7e12, 900e9, pinned=55e9),
    )
}


def this_machine() -> Device:
    """The CPU, whose memory all processes share. Rates are assumed: one core of a common server, float32."""
    memory = min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *control_group_room()])
    return Device("cpu", memory, 50e9, 10e9, 2e9, pinned=2e9, pass_seconds=4e-3)


def device(name: str) -> Device:
    """The device that `plan.device` names."""
    return this_machine() if name == "cpu" else DEVICES[name]


def control_group_room(root: Path = _CONTROL_GROUPS, membership: Path = _MEMBERSHIP) -> list[int]:
    """Bytes left below each memory limit of this process's control groups, from its own group up to the root.

    Containers and jobs are limited by these, and the system's own figures do not show it. Empty without
    limits. Reads both versions of control groups; a container may see its own group as the root.
    """
    if not membership.is_file():
        return []
    rooms = []
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            rooms += list(_rooms(root, path, "memory.max", "memory.current", "inactive_file"))
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            rooms += list(_rooms(root / "memory", path, *names))
    return rooms


def _rooms(root: Path, path: str, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    own = root / path.lstrip("/")
    for group in (own, *own.parents):
        if not group.is_relative_to(root):
            return
        files = group / limit, group / usage, group / "memory.stat"
        if not all(file.is_file() for file in files):
            continue
        allowed, used, statistics = (file.read_text() for file in files)
        if allowed.strip() == "max":
            continue
        counts = dict(entry.split() for entry in statistics.splitlines())
        yield int(allowed) - int(used) + int(counts.get(reclaimable, 0))
