"""Limits and room of this machine, as a process of this user has them. Sizes are bytes."""

import os
import resource
import shutil
from pathlib import Path

import psutil

from treepo.doctor.outcome import Outcome, skipped, verdict
from treepo.planning.hardware import control_group_room

_GIB = 1 << 30
_SHARED_MEMORY = _GIB
_OPEN_FILES = 8192  # what Ray asks for; Ray and SGLang raise the soft limit to the hard one by themselves
_LOCKED_MEMORY = _GIB
_MEMORY = 4 * _GIB  # what training and sampling a toy on a CPU takes, Ray included
_DISK = 2 * _GIB


def shared_memory() -> Outcome:
    """/dev/shm: Ray's object store, NCCL's and torch's buffers between processes of a machine."""
    usage = shutil.disk_usage("/dev/shm")
    return judge_shared_memory(usage.total, usage.free)


def judge_shared_memory(total: int, free: int) -> Outcome:
    return verdict(
        free >= _SHARED_MEMORY,
        f"/dev/shm: {gib(free)} free of {gib(total)}" + _needs(free, _SHARED_MEMORY),
        "in a container: --shm-size=16g or --ipc=host; else remove what others left in /dev/shm, "
        "or mount -o remount,size=16G /dev/shm",
    )


def open_files() -> Outcome:
    """Files and sockets of one process."""
    return judge_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))


def judge_open_files(soft: int, hard: int) -> Outcome:
    good = _at_least(hard, _OPEN_FILES)
    needs = "" if good else f", needs {_OPEN_FILES}"
    return verdict(
        good,
        f"{limit(soft)}, at most {limit(hard)}{needs}",
        "in a container: --ulimit nofile=65536:65536; for a user: hard nofile in /etc/security/limits.conf, "
        "then log in again",
    )


def locked_memory() -> Outcome:
    """Memory that InfiniBand's adapters may read and write must be locked."""
    adapters = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    if not adapters:
        return skipped("no InfiniBand adapter: nothing needs it")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return judge_locked_memory(soft, adapters)


def judge_locked_memory(soft: int, adapters: list[str]) -> Outcome:
    good = _at_least(soft, _LOCKED_MEMORY)
    amount = "unlimited" if soft == resource.RLIM_INFINITY else gib(soft)
    return verdict(
        good,
        f"{amount} for {', '.join(adapters)}" + ("" if good else f", needs {gib(_LOCKED_MEMORY)}"),
        "in a container: --ulimit memlock=-1; for a user: memlock unlimited in /etc/security/limits.conf; "
        "under Slurm: PropagateResourceLimitsExcept=MEMLOCK",
    )


def memory() -> Outcome:
    """Host memory that is free now, within the limits of the container or job."""
    host = psutil.virtual_memory()
    return judge_memory(min([host.available, *control_group_room()]), host.total)


def judge_memory(available: int, total: int) -> Outcome:
    return verdict(
        available >= _MEMORY,
        f"{gib(available)} free of {gib(total)}" + _needs(available, _MEMORY),
        "end what else runs here, or give the container or job more (--memory, --mem)",
    )


def disk() -> Outcome:
    """Room where the command was started, which is where runs go unless `out` says otherwise."""
    folder = Path.cwd()
    return judge_disk(folder, shutil.disk_usage(folder).free, os.access(folder, os.W_OK))


def judge_disk(folder: Path, free: int, writable: bool) -> Outcome:
    if not writable:
        return skipped(f"{folder} cannot be written to: give `out` a folder that can")
    return verdict(
        free >= _DISK,
        f"{folder}: {gib(free)} free" + _needs(free, _DISK),
        "start elsewhere, or give `out` a folder on another disk; a checkpoint has 14 bytes a parameter",
    )


def gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"


def limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value}"


def _at_least(value: int, wanted: int) -> bool:
    return value == resource.RLIM_INFINITY or value >= wanted


def _needs(size: int, wanted: int) -> str:
    return "" if size >= wanted else f", needs {gib(wanted)}"
