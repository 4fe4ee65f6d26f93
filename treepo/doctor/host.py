"""Memory, disk and limits of this machine, as this user's processes have them. Sizes are bytes."""

import os
import resource
import shutil
from pathlib import Path

import psutil

from treepo.doctor.check import Outcome, passed_if, skipped
from treepo.planning.cgroup import cgroup_room

_GIB = 1 << 30
_SHARED_MEMORY = _GIB
_OPEN_FILES = 8192  # Ray asks for as many; Ray and SGLang raise the soft limit to the hard one
_LOCKED_MEMORY = _GIB
_MEMORY = 4 * _GIB  # to train and sample the toy on a CPU, Ray included
_DISK = 2 * _GIB


def shared_memory() -> Outcome:
    """/dev/shm: Ray's object store, and the buffers of NCCL and torch between processes of one machine."""
    usage = shutil.disk_usage("/dev/shm")
    return judge_shared_memory(usage.total, usage.free)


def judge_shared_memory(total: int, free: int) -> Outcome:
    return passed_if(
        free >= _SHARED_MEMORY,
        f"/dev/shm: {_gib(free)} free of {_gib(total)}" + _needs(free, _SHARED_MEMORY),
        "in a container: --shm-size=16g or --ipc=host; elsewhere: delete stale files in /dev/shm, "
        "or mount -o remount,size=16G /dev/shm",
    )


def open_files() -> Outcome:
    """The number of files and sockets that one process may open."""
    return judge_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))


def judge_open_files(soft: int, hard: int) -> Outcome:
    good = _at_least(hard, _OPEN_FILES)
    needs = "" if good else f", needs {_OPEN_FILES}"
    return passed_if(
        good,
        f"{_limit(soft)}, at most {_limit(hard)}{needs}",
        "in a container: --ulimit nofile=65536:65536; for a user: hard nofile in /etc/security/limits.conf, "
        "then log in again",
    )


def locked_memory() -> Outcome:
    """InfiniBand adapters read and write locked memory only."""
    adapters = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    if not adapters:
        return skipped("no InfiniBand adapter: not needed")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return judge_locked_memory(soft, adapters)


def judge_locked_memory(soft: int, adapters: list[str]) -> Outcome:
    good = _at_least(soft, _LOCKED_MEMORY)
    amount = "unlimited" if soft == resource.RLIM_INFINITY else _gib(soft)
    return passed_if(
        good,
        f"{amount} for {', '.join(adapters)}" + ("" if good else f", needs {_gib(_LOCKED_MEMORY)}"),
        "in a container: --ulimit memlock=-1; for a user: memlock unlimited in /etc/security/limits.conf; "
        "under Slurm: PropagateResourceLimitsExcept=MEMLOCK",
    )


def memory() -> Outcome:
    """Free host memory, within the limits of the container or job."""
    host = psutil.virtual_memory()
    return judge_memory(min([host.available, *cgroup_room()]), host.total)


def judge_memory(available: int, total: int) -> Outcome:
    return passed_if(
        available >= _MEMORY,
        f"{_gib(available)} free of {_gib(total)}" + _needs(available, _MEMORY),
        "end other processes, or give the container or job more memory (--memory, --mem)",
    )


def disk() -> Outcome:
    """Free disk in the working directory, where runs are written unless `out` is elsewhere."""
    folder = Path.cwd()
    return judge_disk(folder, shutil.disk_usage(folder).free, os.access(folder, os.W_OK))


def judge_disk(folder: Path, free: int, writable: bool) -> Outcome:
    if not writable:
        return skipped(f"{folder} is not writable: set `out` to a folder that is")
    return passed_if(
        free >= _DISK,
        f"{folder}: {_gib(free)} free" + _needs(free, _DISK),
        "start elsewhere, or set `out` to a folder on another disk; a checkpoint takes 14 bytes a parameter",
    )


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value}"


def _at_least(value: int, wanted: int) -> bool:
    return value == resource.RLIM_INFINITY or value >= wanted


def _needs(size: int, wanted: int) -> str:
    return "" if size >= wanted else f", needs {_gib(wanted)}"
