"""Hosts with a network link of limited rate each, as network namespaces behind one bridge. Needs root,
iproute2 and tc.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import orjson


@dataclass(frozen=True, slots=True)
class Host:
    """namespace: empty for this machine's own network."""

    namespace: str
    address: str

    def enter(self) -> None:
        """Move this thread to the host, with every thread that it starts from now on."""
        if self.namespace:
            with open(f"/run/netns/{self.namespace}") as namespace:
                os.setns(namespace.fileno(), os.CLONE_NEWNET)
            os.environ["GLOO_SOCKET_IFNAME"] = "eth0"

    def link_bytes(self) -> tuple[int, int]:
        """Bytes that the link has sent and received since it was made, with all headers; 0 without a link."""
        if not self.namespace:
            return 0, 0
        (link,) = orjson.loads(_run("ip", "-n", self.namespace, "-s", "-j", "link", "show", "eth0"))
        return link["stats64"]["tx"]["bytes"], link["stats64"]["rx"]["bytes"]


@contextmanager
def limited_links(count: int, megabits: int) -> Iterator[list[Host]]:
    """Hosts whose links carry `megabits` per second each way. 0: `count` times this machine itself."""
    if not megabits:
        yield [Host("", "127.0.0.1")] * count
        return
    bridge = f"tp{os.getpid()}"
    limit = ("tbf", "rate", f"{megabits}mbit", "burst", "256kb", "latency", "50ms")
    with ExitStack() as stack:
        _run("ip", "link", "add", bridge, "type", "bridge")
        stack.callback(_run, "ip", "link", "del", bridge)
        _run("ip", "link", "set", bridge, "up")
        hosts = []
        for index in range(count):
            host = Host(f"{bridge}-{index}", f"198.18.1.{index + 1}")  # reserved for tests of networks
            outside = f"{bridge}x{index}"
            _run("ip", "netns", "add", host.namespace)
            stack.callback(_run, "ip", "netns", "del", host.namespace)
            end = ("peer", "name", "eth0", "netns", host.namespace)
            _run("ip", "link", "add", outside, "type", "veth", *end)
            stack.callback(_run, "ip", "link", "del", outside)  # a namespace ends with its last process only
            _run("ip", "link", "set", outside, "master", bridge, "up")
            _run("ip", "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for name in ("lo", "eth0"):
                _run("ip", "-n", host.namespace, "link", "set", name, "up")
            _run("tc", "qdisc", "add", "dev", outside, "root", *limit)
            _run("tc", "-n", host.namespace, "qdisc", "add", "dev", "eth0", "root", *limit)
            hosts.append(host)
        yield hosts


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
