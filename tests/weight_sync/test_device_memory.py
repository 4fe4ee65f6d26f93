"""CUDA's memory calls, on a runtime that a test makes: what is called, and that nothing stays open."""

import ctypes
import sys
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch
from cuda.bindings import runtime  # type: ignore[reportAttributeAccessIssue]  # it has no stubs

from tests.support.weight_sinks import CPU
from treepo.weight_sync import device_memory
from treepo.weight_sync.device_memory import DeviceBytes, Pinned, copy_from_handle, reason_against_opening

SUCCESS, NO_MEMORY = runtime.cudaError_t.cudaSuccess, runtime.cudaError_t.cudaErrorMemoryAllocation
HANDLE = bytes(range(64))


class FakeRuntime:
    """cuda-bindings' types, and calls that work on the host's memory. fails: the call that does not work."""

    cudaError_t, cudaMemcpyKind = runtime.cudaError_t, runtime.cudaMemcpyKind  # noqa: N815  CUDA's names
    cudaIpcMemHandle_t = runtime.cudaIpcMemHandle_t  # noqa: N815
    cudaIpcMemLazyEnablePeerAccess = runtime.cudaIpcMemLazyEnablePeerAccess  # noqa: N815
    cudaHostRegisterPortable = runtime.cudaHostRegisterPortable  # noqa: N815

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.memory = ctypes.create_string_buffer(b"weights of the trainer", 64)
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            if name == self.fails:
                return (NO_MEMORY, None) if name == "cudaMalloc" else (NO_MEMORY,)
            if name == "cudaIpcOpenMemHandle":
                handle, flags = arguments
                assert ctypes.string_at(handle.getPtr(), 64) == HANDLE
                assert flags == 1
                return SUCCESS, ctypes.addressof(self.memory)
            if name == "cudaMemcpyAsync":
                to, source, nbytes, kind, stream = arguments
                assert (kind, stream) == (runtime.cudaMemcpyKind.cudaMemcpyDefault, 7)
                ctypes.memmove(to, source, nbytes)
            return (SUCCESS,)

        return call


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime()
    stream = SimpleNamespace(cuda_stream=7, synchronize=lambda: fake.calls.append("synchronize"))
    monkeypatch.setattr(device_memory, "_runtime", lambda _: fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: fake.calls.append("empty_cache"))
    return fake


def test_memory_is_copied_and_closed_again(fake: FakeRuntime) -> None:
    flat = copy_from_handle(HANDLE, 7, CPU)
    assert bytes(flat.numpy()) == b"weights"
    assert fake.calls == ["cudaIpcOpenMemHandle", "cudaMemcpyAsync", "synchronize", "cudaIpcCloseMemHandle"]


def test_memory_is_closed_although_the_copy_fails(fake: FakeRuntime) -> None:
    fake.fails = "cudaMemcpyAsync"
    with pytest.raises(RuntimeError, match="cudaMemcpyAsync: cudaErrorMemoryAllocation"):
        copy_from_handle(HANDLE, 7, CPU)
    assert fake.calls[-1] == "cudaIpcCloseMemHandle"


def test_memory_that_does_not_open_is_not_closed(fake: FakeRuntime) -> None:
    fake.fails = "cudaIpcOpenMemHandle"
    with pytest.raises(RuntimeError, match="cudaIpcOpenMemHandle"):
        copy_from_handle(HANDLE, 7, CPU)
    assert fake.calls == ["cudaIpcOpenMemHandle"]


def test_torchs_unused_memory_is_returned_before_an_allocation_fails(fake: FakeRuntime) -> None:
    fake.fails = "cudaMalloc"
    with pytest.raises(RuntimeError, match="cudaMalloc: cudaErrorMemoryAllocation"):
        DeviceBytes(5, CPU)
    assert fake.calls == ["cudaMalloc", "empty_cache", "cudaMalloc"]


def test_host_memory_is_unregistered_once_and_only_if_it_was_registered(fake: FakeRuntime) -> None:
    pinned = Pinned(torch.zeros(8, dtype=torch.uint8), CPU)
    assert pinned.refused == ""
    pinned.release()
    pinned.release()
    assert fake.calls == ["cudaHostRegister", "cudaHostUnregister"]
    fake.calls, fake.fails = [], "cudaHostRegister"
    pinned = Pinned(torch.zeros(8, dtype=torch.uint8), CPU)
    assert pinned.refused == "cudaHostRegister: cudaErrorMemoryAllocation"
    pinned.release()
    assert fake.calls == ["cudaHostRegister"]


@pytest.mark.parametrize(("device", "index"), [("cuda", 3), ("cuda:0", 0), ("cuda:1", 1)])
def test_calls_are_made_on_the_tensors_device(
    device: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device without a number is the current one."""
    chosen: list[int] = []

    def choose(index: int) -> tuple[Any]:
        chosen.append(index)
        return (SUCCESS,)

    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(runtime, "cudaSetDevice", choose)
    monkeypatch.setattr(runtime, "cudaHostUnregister", lambda _: (SUCCESS,))
    device_memory.unregister(torch.zeros(8, dtype=torch.uint8), torch.device(device))
    assert chosen == [index]


def test_without_cuda_bindings_nothing_is_shared_or_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(RuntimeError, match="cuda-bindings is not installed"):
        DeviceBytes(5, CPU)
    assert "cuda-bindings is not installed" in Pinned(torch.zeros(8, dtype=torch.uint8), CPU).refused


def test_gpus_read_each_others_memory_over_nvlink_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    linked = {("GPU-a", "GPU-b")}

    def status(first: str, second: str, _: int) -> int:
        return (
            pynvml.NVML_P2P_STATUS_OK if (first, second) in linked else pynvml.NVML_P2P_STATUS_NOT_SUPPORTED
        )

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda name: name)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetP2PStatus", status)
    assert reason_against_opening("GPU-a", "GPU-a") == ""
    assert reason_against_opening("GPU-a", "GPU-b") == ""
    assert "no NVLink" in reason_against_opening("GPU-a", "GPU-c")
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert "NCCL_P2P_DISABLE" in reason_against_opening("GPU-a", "GPU-b")
    assert reason_against_opening("GPU-a", "GPU-a") == ""


def test_without_nvml_gpus_do_not_read_each_others_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    monkeypatch.setattr(pynvml, "nvmlInit", unavailable)
    assert "NVML does not say" in reason_against_opening("GPU-a", "GPU-b")
