"""Times work on the GPU, or on the CPU if there is none."""

import statistics
import time
from collections.abc import Callable

import torch


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """The median of `repeats` times, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
