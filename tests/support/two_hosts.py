"""Two hosts on one machine: network namespaces joined by a pair of virtual interfaces. Needs root."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest


@dataclass(frozen=True, slots=True)
class Host:
    """A network namespace. A program in it sees only its address and its own loopback."""

    namespace: str
    address: str

    def command(self, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *command]

    def processes(self) -> list[int]:
        """Ids of the processes on this host."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Set up both hosts while the body runs. Skips the test if the machine does not allow it."""
    if shutil.which("ip") is None:
        pytest.skip("two hosts need iproute2")
    # 198.18.0.0/15 is reserved for tests of networks.
    hosts = tuple(Host(f"treepo-{os.getpid()}-{i}", f"198.18.0.{i}") for i in (1, 2))
    interfaces = [f"tp{os.getpid()}-{i}" for i in (1, 2)]
    with ExitStack() as stack:
        try:
            for host in hosts:
                _ip("netns", "add", host.namespace)
                stack.callback(_ip, "netns", "del", host.namespace)
            ends = [
                ["name", interface, "netns", host.namespace]
                for interface, host in zip(interfaces, hosts, strict=True)
            ]
            _ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
            for interface, host in zip(interfaces, hosts, strict=True):
                _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", interface)
                for name in ("lo", interface):
                    _ip("-n", host.namespace, "link", "set", name, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"two hosts need root and network namespaces: {error.stderr.strip()}")
        yield hosts[0], hosts[1]


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
