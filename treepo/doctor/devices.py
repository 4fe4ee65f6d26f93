"""CUDA devices and their driver, as torch sees them."""

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass

import pynvml

from treepo.doctor.outcome import Outcome, failed, passed, skipped, verdict

_NO_GPU = "no GPU: CPU mode"


@dataclass(frozen=True, slots=True)
class Device:
    """memory: bytes. capability: major and minor."""

    name: str
    memory: int
    capability: tuple[int, int]


def devices() -> Outcome:
    """What torch can compute on."""
    import torch

    if torch.cuda.is_available():
        found = [
            Device(props.name, props.total_memory, (props.major, props.minor))
            for props in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ]
        return judge_devices(found, torch.cuda.get_arch_list(), driver_version())
    count = driver_devices()
    if not count:
        return skipped(_NO_GPU)
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None and visible.strip() in ("", "-1"):
        return skipped(f"{_NO_GPU} (CUDA_VISIBLE_DEVICES = {visible!r} hides {count})")
    return failed(f"the driver has {count} GPUs, torch can use none", _why_not())


def judge_devices(found: Sequence[Device], built_for: Sequence[str], driver: str) -> Outcome:
    """built_for: torch's architectures, such as sm_80 and compute_120."""
    kinds = {device: found.count(device) for device in found}
    text = ", ".join(
        f"{count} x {device.name} ({device.memory / (1 << 30):.0f} GiB, "
        f"compute capability {device.capability[0]}.{device.capability[1]})"
        for device, count in kinds.items()
    )
    unfit = [
        device.name for device in kinds if not any(_serves(name, device.capability) for name in built_for)
    ]
    if unfit:
        return failed(
            f"{text}; this torch has no code for {', '.join(unfit)}",
            f"it was built for {', '.join(built_for)}: hide those devices with CUDA_VISIBLE_DEVICES",
        )
    return passed(f"{text}, driver {driver}")


def _serves(architecture: str, capability: tuple[int, int]) -> bool:
    """Machine code (sm_80) runs on later minor versions of its major one, an intermediate (compute_80) is
    compiled for any later one.
    """
    kind, _, version = architecture.partition("_")
    digits = version.rstrip("abcdefghijklmnopqrstuvwxyz")
    least = int(digits[:-1]), int(digits[-1])
    return least <= capability and (kind == "compute" or least[0] == capability[0])


def _why_not() -> str:
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"torch says: {' '.join(str(error).split())}"
    return "torch names no reason; in a container, start it with --gpus all"


def driver() -> Outcome:
    """Whether the driver serves the CUDA version that torch was built with."""
    import torch

    if not driver_devices() and not torch.cuda.is_available():
        return skipped(_NO_GPU)
    return judge_driver(cuda_of_driver(), torch.version.cuda, driver_version())


def judge_driver(served: tuple[int, int] | None, built: str | None, version: str) -> Outcome:
    """Within one major version of CUDA an older driver serves a newer build."""
    if built is None:
        return failed(
            "torch was built without CUDA, and there is a GPU", "pip install -c constraints.txt torch"
        )
    if served is None:
        return failed(
            f"driver {version}, but there is no libcuda.so.1",
            "in a container, start it with --gpus all; else install the driver's user-space part",
        )
    wanted = int(built.split(".")[0])
    found = f"{version}, serves CUDA {served[0]}.{served[1]}; torch was built with CUDA {built}"
    return verdict(
        served[0] >= wanted,
        found,
        f"install a driver for CUDA {wanted} (https://docs.nvidia.com/deploy/cuda-compatibility)",
    )


def cuda_of_driver() -> tuple[int, int] | None:
    """The newest CUDA version that libcuda serves; a compatibility package counts."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)):
        return None
    return number.value // 1000, number.value % 1000 // 10


def driver_devices() -> int:
    """Devices that the driver has, whatever torch can do with them."""
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
