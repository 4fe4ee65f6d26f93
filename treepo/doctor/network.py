"""Sockets, the host's name, and all-reduce between processes of this machine: gloo on CPUs, NCCL on GPUs."""

import ipaddress
import multiprocessing
import socket
import time
from collections.abc import Mapping
from datetime import timedelta

from treepo.doctor.check import Outcome, failed, passed, skipped

_SOCKET_SECONDS = 10.0
_MESSAGE = b"treepo"
_HOSTS = "add the host to /etc/hosts with an address at which other nodes reach it"

_GPUS = 8
_ELEMENTS = 1 << 22  # float32: 16 MiB
_REPEATS = 3
_COLLECTIVE_SECONDS = 60.0


def loopback() -> Outcome:
    """Listen on a port of 127.0.0.1 and connect to it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(_SOCKET_SECONDS)
        address = server.getsockname()
        with socket.create_connection(address, _SOCKET_SECONDS) as client, server.accept()[0] as accepted:
            client.sendall(_MESSAGE)
            received = accepted.recv(len(_MESSAGE), socket.MSG_WAITALL)
    if received != _MESSAGE:
        return failed(
            f"{address[0]}:{address[1]}: sent {_MESSAGE!r}, received {received!r}", "check the firewall"
        )
    return passed(f"{address[0]}:{address[1]} took a connection")


def host_name() -> Outcome:
    """The host's name must resolve to one of its own addresses: gloo and Ray look themselves up by it."""
    name = socket.gethostname()
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        return failed(f"{name} resolves to nothing ({error.strerror})", _HOSTS)
    return judge_host_name(
        name, {str(address[0]): is_own_address(family, address) for family, *_, address in found}
    )


def judge_host_name(name: str, addresses: Mapping[str, bool]) -> Outcome:
    """addresses: each address of the name, and whether this machine has it. One own address is enough for
    gloo.
    """
    own = [address for address, is_own in addresses.items() if is_own]
    foreign = [address for address in addresses if address not in own]
    if not own:
        return failed(f"{name} is {', '.join(foreign)}, which this host does not have", _HOSTS)
    found = f"{name} is {', '.join(own)}"
    if foreign:
        found += f" (and {', '.join(foreign)}, which this host does not have)"
    if all(ipaddress.ip_address(address.split("%")[0]).is_loopback for address in own):
        found += ": enough for one node; others cannot reach it there"
    return passed(found)


def is_own_address(family: int, address: tuple) -> bool:
    """Whether this machine has the address: only then can a socket be bound to it. address: with port 0."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(address)
    except OSError:  # also if the machine does not support the family
        return False
    return True


def gloo() -> Outcome:
    """All-reduce between two processes on the CPU."""
    return _all_reduce("gloo", 2)


def nccl() -> Outcome:
    """All-reduce between processes of one GPU each, at most eight."""
    import torch

    count = min(torch.cuda.device_count(), _GPUS)
    return _all_reduce("nccl", count) if count else skipped("no GPU: CPU mode")


def _all_reduce(backend: str, ranks: int) -> Outcome:
    from treepo.weight_sync.listening_store import listening_store

    store = listening_store("127.0.0.1", timedelta(seconds=_COLLECTIVE_SECONDS))
    context = multiprocessing.get_context("spawn")
    arguments = [(backend, rank, ranks, store.port) for rank in range(ranks)]
    processes = [context.Process(target=_rank, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise RuntimeError(f"{backend}: the ranks' exit codes are {codes}")
    answers = [store.get(f"answer-{rank}").decode() for rank in range(ranks)]
    wrong = [f"rank {rank}: {answer}" for rank, answer in enumerate(answers) if answer.startswith("wrong")]
    if wrong:
        return failed("; ".join(wrong), "")
    speed = "" if ranks == 1 else f", {_ELEMENTS * 4 >> 20} MiB in {float(answers[0]) * 1000:.1f} ms"
    return passed(f"all-reduce between {ranks} process{'es' * (ranks > 1)}{speed}")


def _rank(backend: str, rank: int, ranks: int, port: int) -> None:
    """Element i of rank r is (r + 1) * (i mod 1024), so every sum is known and exact in float32.

    Writes the seconds of the fastest repetition, or the number of wrong sums, to the store.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[reportPrivateImportUsage]  # documented there

    timeout = timedelta(seconds=_COLLECTIVE_SECONDS)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    pattern = (torch.arange(_ELEMENTS, device=device) % 1024).float()
    fastest, wrong = float("inf"), 0
    for _ in range(_REPEATS):
        values = pattern * (rank + 1)
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(values)
        values[-1].item()  # waits for the device
        fastest = min(fastest, time.perf_counter() - started)
        wrong += int((values != pattern * (ranks * (ranks + 1) // 2)).sum())
    store.set(f"answer-{rank}", f"wrong: {wrong} of {_REPEATS * _ELEMENTS} sums" if wrong else f"{fastest}")
    dist.destroy_process_group()
