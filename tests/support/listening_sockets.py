"""Every socket on which the processes of a command can be reached, and what guards it."""

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import psutil

_LISTENS = "00010000"  # __SO_ACCEPTCON in the flags of /proc/net/unix


@dataclass(frozen=True, slots=True)
class Listening:
    """One socket. kind: `tcp`, `udp`, `unix` (with a path) or `abstract`. where: its address or path."""

    process: int
    program: str
    kind: str
    where: str

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it, and of a path, only this user."""
        if self.kind in ("tcp", "udp"):
            return ip_address(self.where.rpartition(":")[0].removeprefix("::ffff:")).is_loopback
        return self.kind == "unix" and is_private(Path(self.where))


def is_private(path: Path) -> bool:
    """Whether a folder above the path lets only its owner in."""
    return any(
        above.exists()
        and not stat.S_IMODE(above.stat().st_mode) & 0o077
        and above.stat().st_uid == os.getuid()
        for above in path.parents
    )


def listening(processes: Iterable[psutil.Process]) -> Iterator[Listening]:
    """The sockets of the processes, which may end meanwhile."""
    unix = dict(_unix_sockets())
    for process in processes:
        with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            program = _name(process)
            for entry in process.net_connections("inet"):
                kind = "tcp" if entry.type.name == "SOCK_STREAM" else "udp"
                if (kind == "tcp" and entry.status == psutil.CONN_LISTEN) or (
                    kind == "udp" and not entry.raddr
                ):
                    yield Listening(process.pid, program, kind, f"{entry.laddr.ip}:{entry.laddr.port}")
            for inode in _inodes(process):
                if (path := unix.get(inode)) is not None:
                    kind = "abstract" if path.startswith("@") else "unix"
                    yield Listening(process.pid, program, kind, path)


def _unix_sockets() -> Iterator[tuple[str, str]]:
    """Inode and path of every unix socket that has a name and listens, or takes datagrams."""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and (fields[3] == _LISTENS or fields[4] == "0002"):
            yield fields[6], fields[7]


def _inodes(process: psutil.Process) -> Iterator[str]:
    for entry in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(OSError):
            target = os.readlink(entry)
            if target.startswith("socket:["):
                yield target[8:-1]


def _name(process: psutil.Process) -> str:
    words = process.cmdline()
    told = [word for word in words if not word.startswith("-")]
    return " ".join(Path(word).name for word in told[:3]) or process.name()
