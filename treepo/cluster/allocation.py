"""Finds the nodes of a launch, and this machine's rank among them.

The first source that names nodes decides: the command line's flags; Slurm; torchrun-style variables
(treepo.cluster.schedulers); RAY_ADDRESS, for a cluster that already runs (KubeRay), in which nothing is
started or stopped. Otherwise the launch is on this machine alone. Environment variables that contradict each
other are an error, unless flags override them all.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from treepo.cluster.schedulers import (
    PORT,
    Allocation,
    check_torchrun_agrees,
    slurm_allocation,
    torchrun_allocation,
)
from treepo.errors import AllocationError


@dataclass(frozen=True, slots=True)
class Flags:
    """The command line's flags; None if not given. head: HOST or HOST:PORT."""

    nodes: int | None = None
    rank: int | None = None
    head: str | None = None
    port: int | None = None


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Ray cluster that already runs. nodes: the minimum number of nodes to wait for."""

    address: str
    nodes: int


def find_allocation(environment: Mapping[str, str], flags: Flags) -> Allocation | Cluster:
    """Find the nodes. Raises AllocationError, which lists the flags and variables that were found."""
    if flags.rank is not None or flags.head is not None:
        return _of_flags(flags)
    found = _of_schedulers(environment)
    address = environment.get("RAY_ADDRESS", "").strip()
    if address == "local":
        address = ""
    if address and found is not None:
        raise AllocationError(
            f"RAY_ADDRESS={address} names a running cluster, and {found.source} names nodes to start one on: "
            "unset the one that you do not mean"
        )
    if address:
        return Cluster(address, flags.nodes or 1)
    if found is None:
        if flags.nodes is not None and flags.nodes > 1:
            raise AllocationError(
                f"--nodes {flags.nodes}, but neither Slurm, torchrun's variables nor RAY_ADDRESS say which "
                "node this is: add --node-rank R --head HOST[:PORT]"
            )
        return Allocation("this machine", nodes=1, rank=0)
    if flags.nodes is not None and flags.nodes != found.nodes:
        raise AllocationError(f"--nodes {flags.nodes} contradicts {found.source}")
    return found if flags.port is None else replace(found, port=flags.port)


def _of_schedulers(environment: Mapping[str, str]) -> Allocation | None:
    slurm = slurm_allocation(environment)
    if slurm is None:
        return torchrun_allocation(environment)
    check_torchrun_agrees(slurm, environment)
    return slurm


def _of_flags(flags: Flags) -> Allocation:
    parts = {"--nodes": flags.nodes, "--node-rank": flags.rank, "--head": flags.head}
    given = " ".join(f"{name} {value}" for name, value in parts.items() if value is not None)
    if flags.nodes is None or flags.rank is None or flags.head is None:
        missing = " and ".join(name for name, value in parts.items() if value is None)
        raise AllocationError(f"{given} without {missing}: all three belong together")
    host, port = _host_and_port(flags.head)
    if port is not None and flags.port is not None and port != flags.port:
        raise AllocationError(f"--head {flags.head} contradicts --port {flags.port}")
    return Allocation(given, flags.nodes, flags.rank, host, port or flags.port or PORT)


def _host_and_port(text: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"([^:\s]+)(?::(\d{1,5}))?", text)
    if match is None or (match[2] is not None and not 0 < int(match[2]) < 65536):
        raise AllocationError(f"--head {text}: expected HOST or HOST:PORT")
    return match[1], None if match[2] is None else int(match[2])
