"""The stages of first_day.py about the card's rates, and about memory that trainer and engine share."""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.stage_process import Context, Figures
from benchmarks.gpu.train_step import MATRIX_RATE
from treepo.config.weights import WeightsConfig
from treepo.weight_sync.send import WeightStream, open_sender
from treepo.weight_sync.wire import Bucket, Sender, TensorInfo, checksum

SECONDS = 30.0
BUCKET_BYTES = 256 << 20

_CUDA = torch.cuda.is_available()
_DEVICE = torch.device("cuda" if _CUDA else "cpu")


def card(context: Context) -> Figures:
    """Rates of a matrix product in bfloat16, and of copies within the card and to the host."""
    size = 256 if context.dry_run else 8192
    a, b = (torch.randn(size, size, device=_DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product = 2 * size**3 / _seconds(lambda: a @ b) / 1e12
    number = (1 if context.dry_run else 256) << 20
    here, there = (torch.empty(number, dtype=torch.uint8, device=_DEVICE) for _ in range(2))
    rates = {"within": 2 * number / _seconds(lambda: there.copy_(here)) / 1e9}
    hosts = {"pageable": torch.ones(number, dtype=torch.uint8)}
    if _CUDA:
        hosts["pinned"] = hosts["pageable"].pin_memory()
    for name, host in hosts.items():
        rates[f"{name}_to_device"] = number / _seconds(lambda: here.copy_(host)) / 1e9  # noqa: B023
        rates[f"{name}_to_host"] = number / _seconds(lambda: host.copy_(here)) / 1e9  # noqa: B023
    name = torch.cuda.get_device_name() if _CUDA else "cpu"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if _CUDA else None
    copies = ", ".join(f"{what.replace('_', ' ')} {rate:.1f}" for what, rate in rates.items())
    return {
        "headline": f"{name}: bfloat16 product {product:.1f} TFLOP/s; GB/s {copies}",
        "device": name,
        "memory_gib": memory,
        "matrix_tflops": product,
        "data_sheet_tflops": MATRIX_RATE.get(name, 0.0) / 1e12 or None,
        "gigabytes_per_second": rates,
    }


def transport(context: Context) -> Figures:
    """Weights through shared memory to the device of another process, which verifies every checksum."""
    number = (1 << 20) if context.dry_run else (1 << 30)
    tensors = {f"weight.{index}": torch.randn(number // 16, device=_DEVICE).bfloat16() for index in range(8)}
    rates = {}
    for name, sender in senders(context).items():
        rates[name] = _rate(sender, tensors)
    shown = ", ".join(f"{name} {rate:.2f} GB/s" for name, rate in rates.items())
    return {"headline": f"{shown}, checksums equal", "bytes": number, "gigabytes_per_second": rates}


def senders(context: Context) -> dict[str, Sender]:
    """Every way through memory of this machine, by name."""
    config = WeightsConfig(transport="colocated")
    return {"pageable": open_sender(config, context.folder("transport"), "127.0.0.1", SECONDS)}


def _rate(sender: Sender, tensors: dict[str, Tensor], repeats: int = 3) -> float:
    """GB/s: the median of the updates after the first, which maps the memory."""
    manifest = tuple(TensorInfo.of(name, tensor) for name, tensor in tensors.items())
    stream = WeightStream(sender, BUCKET_BYTES, SECONDS)
    sink = _CheckingSink()
    try:
        seconds = []
        for version in range(1, repeats + 2):
            start = time.perf_counter()
            outcome = stream.send(iter(tensors.items()), manifest, version, [sink])
            seconds.append(time.perf_counter() - start)
            assert not outcome.failed, outcome.failed
            assert outcome.broken is None, outcome.broken
    finally:
        stream.close()
        sink.close()
    return sum(info.nbytes for info in manifest) / statistics.median(seconds[1:]) / 1e9


class _CheckingSink:
    """Implements `treepo.weight_sync.send.WeightSink` with a process that receives and loads nothing."""

    name = key = "sink"
    ranks = 1

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_receive, args=(theirs,), daemon=True)
        self._process.start()
        self._thread = ThreadPoolExecutor(1)

    def join(self, address: Any) -> "Future[None]":
        return self._order(address)

    def load(self, bucket: Bucket) -> "Future[None]":
        return self._order(bucket)

    def close(self) -> None:
        self._ours.send(None)
        self._process.join()
        self._thread.shutdown()

    def _order(self, argument: Any) -> "Future[None]":
        def obey() -> None:
            self._ours.send(argument)
            error = self._ours.recv()
            assert error is None, error

        return self._thread.submit(obey)


def _receive(orders: Any) -> None:
    """A sink's process: joins addresses and checks buckets until None arrives."""
    receiver: Any = None
    while (order := orders.recv()) is not None:
        if isinstance(order, Bucket):
            found = checksum(receiver.receive(order))
            orders.send(None if found == order.checksum else "a bucket arrived with another checksum")
        else:
            receiver = order.join(0, _DEVICE)
            orders.send(None)


def _seconds(work: Callable[[], object], repeats: int = 10) -> float:
    work()
    times = []
    for _ in range(repeats):
        _synchronize()
        start = time.perf_counter()
        work()
        _synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _synchronize() -> None:
    if _CUDA:
        torch.cuda.synchronize()
