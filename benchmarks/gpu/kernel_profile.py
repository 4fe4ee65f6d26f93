"""Profiles one train step: device seconds, and their share in each family of kernels.

A kernel belongs to `optimizer` if it runs after the optimizer began, and otherwise to the first family in
FAMILIES whose pattern its name matches, or to `other`. On a CPU torch's operations take the place of kernels,
so that a dry run covers this file; no pattern matches the names of most of them.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[reportPrivateImportUsage]  # documented there
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.gpu.timing import synchronize
from megatron_bridge import optimizer

FAMILIES = {
    "attention_backward": r"(flex_attention|flash).*(backward|bwd)",
    "attention_forward": r"flex_attention|flash",
    "matmul": r"gemm|gemv|nvjet|xmma|cutlass|splitk|^aten::(add|b)?mm$",
    "elementwise": (
        r"elementwise|reduce_kernel|triton_(poi|per|red)_|layer_norm|gammabeta|catarray|indexselect"
    ),
}
"""Pointwise kernels, reductions and copies between tensors are `elementwise`."""

_OPTIMIZER = "optimizer"


@dataclass(frozen=True, slots=True)
class Kernel:
    """One run of a kernel. start: in microseconds on the profiler's clock."""

    name: str
    start: float
    microseconds: float


def profile_step(step: Callable[[], object]) -> dict[str, Any]:
    """Run a train step under torch's profiler, and return `summary` of its kernels.

    The step waits for the device before the optimizer, so its clock time is not that of other steps.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with _marked_optimizer(), profile(activities=activities) as profiler:
        step()
        synchronize()
    events = list(profiler.events() or ())
    return summary(
        _kernels(events), min(event.time_range.start for event in events if event.name == _OPTIMIZER)
    )


def summary(kernels: Iterable[Kernel], optimizer_start: float) -> dict[str, Any]:
    """The number of kernels, their device seconds, and each family's share of those."""
    time = dict.fromkeys((*FAMILIES, _OPTIMIZER, "other"), 0.0)
    count = 0
    for kernel in kernels:
        count += 1
        family = _OPTIMIZER if kernel.start >= optimizer_start else family_of(kernel.name)
        time[family] += kernel.microseconds
    total = sum(time.values())
    return {
        "kernels": count,
        "device_seconds": total / 1e6,
        "share": {family: microseconds / total for family, microseconds in time.items()},
    }


def family_of(name: str) -> str:
    """The family of a kernel that is not the optimizer's."""
    matching = (family for family, pattern in FAMILIES.items() if re.search(pattern, name, re.IGNORECASE))
    return next(matching, "other")


def _kernels(events: Iterable[Any]) -> list[Kernel]:
    """The profiler's device events; without CUDA its operations, by the time that is theirs alone."""
    if torch.cuda.is_available():
        return [
            Kernel(event.name, event.time_range.start, event.time_range.elapsed_us())
            for event in events
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
    return [Kernel(event.name, event.time_range.start, event.self_cpu_time_total) for event in events]


@contextmanager
def _marked_optimizer() -> Iterator[None]:
    """Within it a train step's optimizer begins when the device is idle, and its start is an event."""
    original = optimizer.step

    def step(*arguments: Any) -> float:
        synchronize()
        with record_function(_OPTIMIZER):
            return original(*arguments)

    optimizer.step = step
    try:
        yield
    finally:
        optimizer.step = original
