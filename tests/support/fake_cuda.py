"""Stands in for CUDA's memory in the tests of the colocated transport: the "device" is host memory.

Only what a CPU can show is tested with it: which way is chosen, what is copied when, what is freed.
"""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from tests.support.weight_sinks import CPU
from treepo.weight_sync import device_memory
from treepo.weight_sync.shared_memory import SharedBytes, map_bytes

GPU = torch.device("cuda", 0)


@dataclass
class FakeCuda:
    """Its methods replace the functions of `treepo.weight_sync.device_memory` with the same names.

    free: bytes that can be allocated. broken: what opening another process's memory raises. corrupt: whether
    it then reads other bytes. topology: why the GPUs should not read each other. unregistrable: what
    registering host memory raises. copied: bytes of each copy from host to device.
    """

    free: int = 1 << 30
    broken: str = ""
    corrupt: bool = False
    topology: str = ""
    unregistrable: str = ""
    allocated: dict[int, int] = field(default_factory=dict)
    registered: list[int] = field(default_factory=list)
    copied: list[int] = field(default_factory=list)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("copy_from_handle", "register", "unregister", "to_device", "reason_against_opening"):
            patch.setattr(device_memory, name, getattr(self, name))
        patch.setattr(device_memory, "DeviceBytes", lambda nbytes, _: FakeDeviceBytes(nbytes, self))
        patch.setattr(device_memory, "synchronize", lambda _: None)
        patch.setattr(device_memory, "release_unused", lambda: None)
        patch.setattr(device_memory, "device_name", lambda _: "GPU-0")

    def copy_from_handle(self, handle: bytes, nbytes: int, device: torch.device) -> Tensor:
        assert device == GPU
        if self.broken:
            raise RuntimeError(self.broken)
        path, mapped = handle.decode().split()
        return map_bytes(path, int(mapped))[:nbytes].clone() + self.corrupt

    def register(self, host: Tensor, device: torch.device) -> None:
        assert device == GPU
        if self.unregistrable:
            raise RuntimeError(self.unregistrable)
        self.registered.append(host.data_ptr())

    def unregister(self, host: Tensor, device: torch.device) -> None:
        assert device == GPU
        self.registered.remove(host.data_ptr())

    def to_device(self, host: Tensor, device: torch.device) -> Tensor:
        if device == CPU:
            return host
        self.copied.append(len(host))
        return host.clone()

    def reason_against_opening(self, owner: str, opener: str) -> str:
        assert owner == opener == "GPU-0"
        return self.topology


class FakeDeviceBytes:
    def __init__(self, nbytes: int, cuda: FakeCuda) -> None:
        if sum(cuda.allocated.values()) + nbytes > cuda.free:
            raise RuntimeError("cudaMalloc: cudaErrorMemoryAllocation")
        self._shared, self._cuda = SharedBytes(nbytes), cuda
        self.bytes = self._shared.bytes
        self.handle = f"{self._shared.path} {nbytes}".encode()
        cuda.allocated[id(self)] = nbytes

    def close(self) -> None:
        del self._cuda.allocated[id(self)]
        self._shared.close()
