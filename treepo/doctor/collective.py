"""An all-reduce between processes, its sum checked: gloo on the CPU, NCCL on the GPUs of this machine."""

import multiprocessing
import socket
import time
from datetime import timedelta

from treepo.doctor.outcome import Outcome, failed, passed, skipped

_GPUS = 8
_ELEMENTS = 1 << 22  # float32: 16 MiB
_TIMES = 3
_SECONDS = 60.0


def gloo() -> Outcome:
    """Between two processes."""
    return _all_reduce("gloo", 2)


def nccl() -> Outcome:
    """Between processes of one GPU each, up to eight."""
    import torch

    count = min(torch.cuda.device_count(), _GPUS)
    return _all_reduce("nccl", count) if count else skipped("no GPU: CPU mode")


def _all_reduce(backend: str, ranks: int) -> Outcome:
    from torch.distributed import TCPStore  # type: ignore[reportPrivateImportUsage]  # documented there

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_rank, args=(backend, rank, ranks, port)) for rank in range(ranks)]
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
    """Every element's sum is known: rank r brings (r + 1) x its index modulo 1024, exact in float32."""
    import torch
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[reportPrivateImportUsage]  # documented there

    timeout = timedelta(seconds=_SECONDS)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    pattern = (torch.arange(_ELEMENTS, device=device) % 1024).float()
    best, wrong = float("inf"), 0
    for _ in range(_TIMES):
        values = pattern * (rank + 1)
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(values)
        values[-1].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
        wrong += int((values != pattern * (ranks * (ranks + 1) // 2)).sum())
    store.set(f"answer-{rank}", f"wrong: {wrong} of {_TIMES * _ELEMENTS} sums" if wrong else f"{best}")
    dist.destroy_process_group()
