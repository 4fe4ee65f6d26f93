"""CUDA devices and their driver: can torch use them?"""

import ctypes
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import pynvml

from treepo.doctor.check import Outcome, failed, passed, passed_if, skipped
from treepo.errors import one_line

_NO_GPU = "no GPU: CPU mode"


@dataclass(frozen=True, slots=True)
class Device:
    """memory: bytes. capability: CUDA compute capability, major and minor."""

    name: str
    memory: int
    capability: tuple[int, int]


def devices() -> Outcome:
    """Every GPU of the driver must be one that torch can compute on."""
    import torch

    if torch.cuda.is_available():
        found = [
            Device(props.name, props.total_memory, (props.major, props.minor))
            for props in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ]
        return judge_devices(found, torch.cuda.get_arch_list(), driver_version())
    count = driver_device_count()
    if not count:
        return skipped(_NO_GPU)
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None and visible.strip() in ("", "-1"):
        return skipped(f"{_NO_GPU} (CUDA_VISIBLE_DEVICES = {visible!r} hides {count})")
    return failed(f"the driver has {count} GPUs, torch can use none of them", _reason_of_torch())


def judge_devices(found: Sequence[Device], built_for: Sequence[str], driver: str) -> Outcome:
    """built_for: the architectures that torch was built for, such as sm_80 and compute_120."""
    kinds = {device: found.count(device) for device in found}
    text = ", ".join(
        f"{count} x {device.name} ({device.memory / (1 << 30):.0f} GiB, "
        f"compute capability {device.capability[0]}.{device.capability[1]})"
        for device, count in kinds.items()
    )
    unfit = [
        device.name for device in kinds if not any(_runs_on(name, device.capability) for name in built_for)
    ]
    if unfit:
        return failed(
            f"{text}; this torch has no code for {', '.join(unfit)}",
            f"it was built for {', '.join(built_for)}: hide the other devices with CUDA_VISIBLE_DEVICES",
        )
    return passed(f"{text}, driver {driver}")


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Machine code (sm_80) runs on the same major version from its minor version on. Intermediate code
    (compute_80) is compiled for any later version.
    """
    kind, _, version = architecture.partition("_")
    digits = version.rstrip("abcdefghijklmnopqrstuvwxyz")
    lowest = int(digits[:-1]), int(digits[-1])
    return lowest <= capability and (kind == "compute" or lowest[0] == capability[0])


def _reason_of_torch() -> str:
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"torch says: {one_line(error)}"
    return "torch gives no reason; start a container with --gpus all"


def cuda_ipc() -> Outcome:
    """Another process must be able to open a GPU's memory, as engines do that share the trainer's GPU."""
    import torch

    from treepo.weight_sync.colocated import ColocatedSender
    from treepo.weight_sync.shards import everything

    if not torch.cuda.is_available():
        return skipped(_NO_GPU)
    device = torch.device("cuda", 0)
    sender = ColocatedSender(device)
    (address,) = sender.addresses([1])
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        other.submit(address.join, 0, device, everything).result()
    sender.buffer(0, 1)  # chooses the way
    return judge_ipc(sender.way, [remark.text for remark in sender.take_remarks()])


def judge_ipc(way: str | None, remarks: Sequence[str]) -> Outcome:
    """way, remarks: of a `ColocatedSender` that a receiver has joined."""
    text = "; ".join(remarks)
    if way == "ipc":
        return passed(text)
    return skipped(
        text,
        "weights.transport = colocated works without it, more slowly; if trainer and engines are in several "
        "containers, start these with --ipc=host --pid=host",
    )


def driver() -> Outcome:
    """The driver must support the CUDA version that torch was built with."""
    import torch

    if not driver_device_count() and not torch.cuda.is_available():
        return skipped(_NO_GPU)
    return judge_driver(driver_cuda(), torch.version.cuda, driver_version())


def judge_driver(supported: tuple[int, int] | None, built: str | None, version: str) -> Outcome:
    """supported: the driver's newest CUDA version, None without libcuda. built: torch's CUDA version.

    Within one major version of CUDA, an older driver runs a newer build.
    """
    if built is None:
        return failed(
            "this machine has a GPU, but torch was built without CUDA", "pip install -c constraints.txt torch"
        )
    if supported is None:
        return failed(
            f"driver {version}, but libcuda.so.1 is missing",
            "start a container with --gpus all; elsewhere install the driver's user-space libraries",
        )
    wanted = int(built.split(".")[0])
    found = f"{version}, supports CUDA {supported[0]}.{supported[1]}; torch was built with CUDA {built}"
    return passed_if(
        supported[0] >= wanted,
        found,
        f"install a driver for CUDA {wanted} (https://docs.nvidia.com/deploy/cuda-compatibility)",
    )


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA version that libcuda supports, compatibility package included; None without libcuda."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)):
        return None
    return number.value // 1000, number.value % 1000 // 10


def driver_device_count() -> int:
    """The driver's GPUs, including those that torch cannot use; 0 without a driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    return pynvml.nvmlDeviceGetCount()


def driver_version() -> str:
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError as error:
        return f"of unknown version ({error})"
