"""The devices of this machine, as `treepo init` and the planner name them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from treepo.errors import ConfigError
from treepo.planning.hardware import DEVICES, GIB

_SLACK = 1.0 * GIB  # boards of one kind differ by less


@dataclass(frozen=True, slots=True)
class Machine:
    """gpus: 0 if the CPU computes. device: a value of `plan.device`. name: for a person."""

    gpus: int
    device: str
    name: str
    memory_gib: int


def found_machine() -> Machine:
    """Look at the GPUs that torch can use. Raises ConfigError for those that the planner cannot plan for."""
    import torch

    count = torch.cuda.device_count()
    found = [torch.cuda.get_device_properties(index) for index in range(count)]
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return machine_of([(gpu.name, gpu.total_memory) for gpu in found], host)


def machine_of(gpus: Sequence[tuple[str, int]], host: int) -> Machine:
    """gpus: name and bytes of each. host: bytes of the host's memory."""
    memory = max(int(host / GIB), 1)
    if not gpus:
        return Machine(0, "cpu", "the CPU of this machine", memory)
    kinds = set(gpus)
    if len(kinds) > 1:
        names = ", ".join(sorted({name for name, _ in kinds}))
        raise ConfigError(
            f"the GPUs of this machine differ ({names}): CUDA_VISIBLE_DEVICES=0,1 hides all but two"
        )
    name, size = gpus[0]
    return Machine(len(gpus), _planned(name, size), f"{len(gpus)} x {name}", memory)


def _planned(name: str, size: int) -> str:
    """The planner's device: of this name, else the largest that has no more memory."""
    fitting = {key: device for key, device in DEVICES.items() if device.memory <= size + _SLACK}
    if not fitting:
        least = min(DEVICES.values(), key=lambda device: device.memory)
        raise ConfigError(
            f"{name} has {size / GIB:.0f} GiB, and the planner knows no device of less than "
            f"{least.memory / GIB:.0f} GiB ({least.name}): write the file by hand, after "
            "examples/quickstart.yaml; CUDA_VISIBLE_DEVICES= makes one for the CPU"
        )
    named = {key: device for key, device in fitting.items() if key.partition("-")[0] in name.lower()}
    return max(named or fitting, key=lambda key: DEVICES[key].memory)
