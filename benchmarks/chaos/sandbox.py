"""Runs a case in namespaces of its own, where every process, socket and temporary file is the run's.

The case's program is the first process of its process namespace: processes that lose their parent become its
children, and all end with it. /tmp and /dev/shm are new and empty. The network has a loopback and one
interface that leads nowhere. Needs root, or a kernel that lets users make user namespaces.
"""

import os
import socket
import subprocess
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

TEMPORARY, SHARED_MEMORY = Path("/tmp"), Path("/dev/shm")
ADDRESS, OTHER_ADDRESS = "198.18.0.1", "198.18.0.2"  # 198.18.0.0/15 is reserved for tests of networks
_OTHER_HOST = "other-host"
_LISTEN = "0A"  # in /proc/net/tcp


def command(program: Sequence[str]) -> list[str]:
    """The command that runs `program` as the first process of its own namespaces."""
    options = ["--mount", "--pid", "--net", "--ipc", "--fork", "--mount-proc", "--kill-child"]
    if os.geteuid() != 0:
        options.append("--map-root-user")
    return ["unshare", *options, "--propagation", "private", *program]


def enter(folder: Path) -> None:
    """Called once by the program: set up network, /tmp and /dev/shm. `folder` stays visible."""
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "link", "add", "chaos0", "type", "veth", "peer", "name", "chaos1")
    _run("ip", "addr", "add", f"{ADDRESS}/24", "dev", "chaos0")
    for interface in ("chaos0", "chaos1"):
        _run("ip", "link", "set", interface, "up")
    _run("ip", "route", "add", "default", "dev", "chaos0")
    _run("mount", "-t", "tmpfs", "tmpfs", "/run")  # for the names of network namespaces
    kept = os.open(folder, os.O_PATH)
    for place, size in ((TEMPORARY, "2g"), (SHARED_MEMORY, "8g")):
        _run("mount", "-t", "tmpfs", "-o", f"size={size},mode=1777", "tmpfs", str(place))
    if not folder.exists():  # it is below /tmp
        folder.mkdir(parents=True)
        _run("mount", "--bind", f"/proc/{os.getpid()}/fd/{kept}", str(folder))
    os.close(kept)


def add_other_host() -> None:
    """Make a second host, at the other end of this one's network: a network namespace."""
    _run("ip", "netns", "add", _OTHER_HOST)
    _run("ip", "link", "set", "chaos1", "netns", _OTHER_HOST)
    on_other = ("ip", "-n", _OTHER_HOST)
    _run(*on_other, "addr", "add", f"{OTHER_ADDRESS}/24", "dev", "chaos1")
    for interface in ("lo", "chaos1"):
        _run(*on_other, "link", "set", interface, "up")
    _run(*on_other, "route", "add", "default", "dev", "chaos1")


def on_other_host(command: Sequence[str]) -> list[str]:
    return ["ip", "netns", "exec", _OTHER_HOST, *command]


def is_on_other_host(process: psutil.Process) -> bool:
    with suppress(OSError):
        return os.stat(f"/proc/{process.pid}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino
    return False


def _run(*arguments: str) -> None:
    subprocess.run(arguments, check=True)


def reap(kept: Collection[int] = ()) -> None:
    """Collect the exit codes of processes without a parent. kept: those that their `Popen` waits for."""
    for process in psutil.Process().children():
        if process.pid not in kept:
            with suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)


def processes() -> list[psutil.Process]:
    """Every process of the namespace but this one; zombies are left out."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess):
            if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def files(kept: Path) -> list[Path]:
    """The entries of /tmp and /dev/shm. kept: a folder that does not count, nor do the folders above it."""
    entries = [*TEMPORARY.iterdir(), *SHARED_MEMORY.iterdir()]
    return sorted(entry for entry in entries if entry != kept and entry not in kept.parents)


def listening() -> list[str]:
    """Address and port of each TCP socket that listens."""
    return [address for name in ("tcp", "tcp6") for address in _listening(Path(f"/proc/net/{name}"))]


def _listening(table: Path) -> list[str]:
    rows = [line.split() for line in table.read_text().splitlines()[1:]]
    return [_readable(row[1]) for row in rows if row[3] == _LISTEN]


def _readable(address: str) -> str:
    host, _, port = address.partition(":")
    if len(host) == 8:
        host = socket.inet_ntoa(bytes.fromhex(host)[::-1])
    return f"{host}:{int(port, 16)}"
