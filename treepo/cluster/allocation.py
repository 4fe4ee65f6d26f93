"""Which nodes a launch has, and which of them this is.

Who may say so, the first that does decides: flags; Slurm; torchrun-style variables
(treepo.cluster.schedulers); RAY_ADDRESS, a cluster that is there already (KubeRay), in which nothing is
started or stopped; nobody, and then it is this machine alone. Two of the environment that contradict each
other are refused; flags silence them all.
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
    """What the command line says; None where it says nothing. head: HOST or HOST:PORT."""

    nodes: int | None = None
    rank: int | None = None
    head: str | None = None
    port: int | None = None


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Ray cluster that is there already. nodes: it is waited for so many at least."""

    address: str
    nodes: int


def find_allocation(environment: Mapping[str, str], flags: Flags) -> Allocation | Cluster:
    """Raises AllocationError: one line of what was found where."""
    if flags.rank is not None or flags.head is not None:
        return _of_flags(flags)
    found = _of_schedulers(environment)
    address = environment.get("RAY_ADDRESS")
    if address and found is not None:
        raise AllocationError(
            f"RAY_ADDRESS={address} names a cluster that is there, and {found.source} nodes to start one on: "
            "unset the one that is not meant"
        )
    if address:
        return Cluster(address, flags.nodes or 1)
    if found is None:
        if flags.nodes is not None and flags.nodes > 1:
            raise AllocationError(
                f"--nodes {flags.nodes}, but neither Slurm, torchrun's variables nor RAY_ADDRESS say which "
                "node this is: --node-rank R --head HOST[:PORT] are needed too"
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
