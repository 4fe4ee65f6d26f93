"""Memory that this process's control groups leave it: containers and jobs are bounded by those, and the
system's own figures do not show it. Sizes are bytes.
"""

from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def cgroup_room(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> list[int]:
    """What is left below each limit, from the process's own group up to the root; empty where there is none.

    Both versions of control groups are read. A container may see its own group as the root.
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
        most, used, statistics = (file.read_text() for file in files)
        if most.strip() == "max":
            continue
        counts = dict(entry.split() for entry in statistics.splitlines())
        yield int(most) - int(used) + int(counts.get(reclaimable, 0))
