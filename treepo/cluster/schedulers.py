"""Reads the environment variables by which Slurm and torchrun-style launchers describe a node. Pure.

Slurm: SLURM_NNODES, SLURM_NODEID, SLURM_JOB_NODELIST. The variables of a step (SLURM_STEP_*) come first,
because a step may have fewer nodes than its job. The head is the first host of the list.

torchrun style: NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, each also as PET_*. WORLD_SIZE and RANK count
processes under torchrun but nodes in a PyTorchJob, so they are read only if both readings agree: with one
process in all, or one on each node (LOCAL_WORLD_SIZE=1).
"""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from treepo.errors import AllocationError

PORT = 29400
"""The default port of the rendezvous, on the head."""

_SLURM_PORTS = range(20_000, 32_000)  # below the ports that Linux hands out
_MOST_DIGITS = 18
_MOST_HOSTS = 1 << 16
_REMEDY = "--nodes N --node-rank R --head HOST[:PORT] decide"


@dataclass(frozen=True, slots=True)
class Allocation:
    """The nodes of a launch, and the rank of this one.

    source: the flags or variables that it comes from, for errors. head, port: of the rendezvous. hosts: the
    nodes' names in the order of ranks; empty if the source has none.
    """

    source: str
    nodes: int
    rank: int
    head: str = "127.0.0.1"
    port: int = 0
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.nodes < 1 or not 0 <= self.rank < self.nodes:
            raise AllocationError(f"{self.source}: {self.nodes} nodes have no rank {self.rank}")

    def name(self, rank: int) -> str:
        return f"node {rank} ({self.hosts[rank]})" if self.hosts else f"node {rank}"


@dataclass(frozen=True, slots=True)
class _Found:
    """A variable that is set, printed as NAME=value."""

    name: str
    value: str

    def __str__(self) -> str:
        return f"{self.name}={self.value}"

    def number(self) -> int:
        if not self.value.isdecimal() or len(self.value) > _MOST_DIGITS:
            raise AllocationError(f"{self}: expected a number; {_REMEDY}")
        return int(self.value)


def slurm_allocation(environment: Mapping[str, str]) -> Allocation | None:
    """Read Slurm's variables; None outside of Slurm. Raises AllocationError."""
    nodes = _first(environment, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
    rank = _first(environment, "SLURM_NODEID")
    hosts = _first(environment, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    if nodes is None and rank is None and hosts is None:
        return None
    if nodes is None or rank is None or hosts is None:
        raise _incomplete("Slurm", {"SLURM_NNODES": nodes, "SLURM_NODEID": rank, "SLURM_JOB_NODELIST": hosts})
    tasks = _first(environment, "SLURM_STEP_NUM_TASKS")
    if tasks is not None and tasks.number() != nodes.number():
        raise AllocationError(f"{tasks} for {nodes}: run one task on each node (--ntasks-per-node=1)")
    names = expand_nodelist(hosts.value)
    if len(names) != nodes.number():
        raise AllocationError(f"{nodes} contradicts {hosts}, which names {len(names)} hosts; {_REMEDY}")
    source = f"{nodes}, {rank}, {hosts}"
    return Allocation(source, len(names), rank.number(), names[0], _slurm_port(environment), tuple(names))


def torchrun_allocation(environment: Mapping[str, str]) -> Allocation | None:
    """Read torchrun's variables; None if they describe no nodes. Raises AllocationError."""
    per_node = _processes_per_node(environment)
    nodes, rank, head, port = (
        _agreeing(environment, name, f"PET_{name}")
        for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    )
    if nodes is None and rank is None:
        nodes, rank = _first(environment, "WORLD_SIZE"), _first(environment, "RANK")
        if nodes is not None and per_node is None and nodes.number() > 1:
            raise AllocationError(
                f"{nodes} counts processes under torchrun and nodes in a PyTorchJob: set NNODES and "
                "NODE_RANK (in a PyTorchJob to $WORLD_SIZE and $RANK)"
            )
    if nodes is None and rank is None:
        return None  # MASTER_ADDR alone describes no nodes
    count = None if nodes is None else _node_count(nodes)
    if count == 1:
        return Allocation(str(nodes), 1, 0 if rank is None else rank.number())
    if count is None or rank is None or head is None:
        raise _incomplete("torchrun's variables", {"NNODES": nodes, "NODE_RANK": rank, "MASTER_ADDR": head})
    source = f"{nodes}, {rank}, {head}"
    return Allocation(source, count, rank.number(), head.value, _torchrun_port(environment, port))


def check_torchrun_agrees(allocation: Allocation, environment: Mapping[str, str]) -> None:
    """Raise AllocationError if torchrun's variables, which Slurm scripts often set, contradict Slurm's."""
    _processes_per_node(environment)
    nodes = _agreeing(environment, "NNODES", "PET_NNODES")
    rank = _agreeing(environment, "NODE_RANK", "PET_NODE_RANK")
    if nodes is not None and _node_count(nodes) != allocation.nodes:
        raise AllocationError(f"{allocation.source} contradicts {nodes}; {_REMEDY}")
    if rank is not None and rank.number() != allocation.rank:
        raise AllocationError(f"{allocation.source} contradicts {rank}; {_REMEDY}")


def expand_nodelist(text: str) -> list[str]:
    """Expand Slurm's short form of host names: "gpu[08-10,12],login" is gpu08, gpu09, gpu10, gpu12, login."""
    names: list[str] = []
    if not re.fullmatch(r"(?:[^\[\],\s]|\[[\d,-]+\])+(?:,(?:[^\[\],\s]|\[[\d,-]+\])+)*", text):
        raise AllocationError(f"{text!r} is not a Slurm node list; {_REMEDY}")
    for item in re.findall(r"(?:[^\[\],]|\[[^\]]*\])+", text):
        parts = re.findall(r"\[([^\]]*)\]|([^\[]+)", item)
        choices = [_numbers(ranges, text) if ranges else [plain] for ranges, plain in parts]
        if len(names) + math.prod(map(len, choices)) > _MOST_HOSTS:
            raise _too_many(text)
        names += map("".join, itertools.product(*choices))
    return names


def _numbers(ranges: str, text: str) -> list[str]:
    """Expand "08-10,12" to 08, 09, 10, 12: each as wide as the first number of its range."""
    numbers: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise AllocationError(f"{text!r} is not a Slurm node list: [{ranges}]; {_REMEDY}")
        first, last = match[1], match[2] or match[1]
        if max(len(first), len(last)) > _MOST_DIGITS or int(last) - int(first) + len(numbers) >= _MOST_HOSTS:
            raise _too_many(text)
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def _too_many(text: str) -> AllocationError:
    return AllocationError(f"{text!r} names more than {_MOST_HOSTS} hosts; {_REMEDY}")


def _slurm_port(environment: Mapping[str, str]) -> int:
    """A port that every node of a job computes, and another job on the same host is unlikely to compute."""
    job = _first(environment, "SLURM_JOB_ID")
    return PORT if job is None else _SLURM_PORTS[job.number() % len(_SLURM_PORTS)]


def _torchrun_port(environment: Mapping[str, str], port: _Found | None) -> int:
    """MASTER_PORT, unless torchrun itself runs: its own store listens there."""
    if port is None or environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return PORT
    if not 0 < port.number() < 65536:
        raise AllocationError(f"{port}: expected a port, 1 to 65535; {_REMEDY}")
    return port.number()


def _processes_per_node(environment: Mapping[str, str]) -> _Found | None:
    found = _first(environment, "LOCAL_WORLD_SIZE")
    if found is not None and found.number() > 1:
        raise AllocationError(f"{found}: run one process on each node, not one on each GPU")
    return found


def _node_count(nodes: _Found) -> int:
    """The value of NNODES. It may be a range if both ends are equal: "2:2"."""
    low, _, high = nodes.value.partition(":")
    if high and high != low:
        raise AllocationError(f"{nodes}: a launch has a fixed number of nodes")
    return _Found(nodes.name, low).number()


def _first(environment: Mapping[str, str], *names: str) -> _Found | None:
    return next((_Found(name, environment[name]) for name in names if environment.get(name)), None)


def _agreeing(environment: Mapping[str, str], *names: str) -> _Found | None:
    """One value under several names. Raises AllocationError if the names differ in value."""
    found = [_Found(name, environment[name]) for name in names if environment.get(name)]
    if len({variable.value for variable in found}) > 1:
        raise AllocationError(f"{' and '.join(map(str, found))} contradict each other; {_REMEDY}")
    return found[0] if found else None


def _incomplete(source: str, parts: Mapping[str, _Found | None]) -> AllocationError:
    found = ", ".join(str(variable) for variable in parts.values() if variable is not None)
    missing = " and ".join(name for name, variable in parts.items() if variable is None)
    return AllocationError(f"{source} has {found}, but no {missing}; {_REMEDY}")
