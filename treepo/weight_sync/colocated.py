"""Sends weights to engines on the same machine, through the memory of the trainer's GPU or of the host.

Buckets are filled in two buffers on the GPU of trainer rank 0. If every engine rank can open that memory by
CUDA IPC and reads it fast (on the same GPU, or over NVLink), ranks copy buckets from it. Each rank tries it
on a probe when it joins. Otherwise buckets are copied once more, into two buffers in host memory that both
sides map and register with CUDA; a rank of a tensor-parallel engine then copies only the slices that it
needs. On a CPU the buffers in host memory are the only ones.
"""

import logging
import os
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Literal

import torch
from torch import Tensor

from treepo.weight_sync import device_memory
from treepo.weight_sync.colocated_receiver import ColocatedAddress, DevicePlace, HostPlace, Probe
from treepo.weight_sync.device_memory import DeviceBytes, Pinned
from treepo.weight_sync.shared_memory import Reports, SharedBytes
from treepo.weight_sync.wire import Manifest, Remark, checksums

Way = Literal["ipc", "registered", "pageable"]
"""Through the GPU's memory, or through host memory that is registered with CUDA or is not."""

_PROBE_BYTES = 1 << 16
_HOST = "through host memory"


class ColocatedSender:
    """best: the fastest way to try; others than "ipc" are for measurements. device: of the weights.

    Device memory is freed after each update. Host memory is kept for the next, because it takes longer to
    register it than to fill it.
    """

    collective: ClassVar[bool] = False

    def __init__(self, device: torch.device, best: Way = "ipc") -> None:
        self._device, self._best = device, best
        self._reports: Reports | None = None
        self._probe: DeviceBytes | None = None
        self._way: Way | None = None  # None until the engines have joined
        self._on_device = False  # whether buckets are filled in the GPU's memory
        self._filled_there: set[int] = set()  # slots whose present bucket is
        self._device_slots: dict[int, DeviceBytes] = {}
        self._host_slots: dict[int, _HostSlot] = {}
        self._made = 0
        self._remarks: list[Remark] = []

    @property
    def way(self) -> Way | None:
        """How buckets travel; None before the first update."""
        return self._way

    @property
    def _host_way(self) -> Way:
        registers = self._device.type == "cuda" and self._best != "pageable"
        return "registered" if registers else "pageable"

    def addresses(self, ranks: Sequence[int]) -> list[ColocatedAddress]:
        self.close()
        self._reports = Reports(sum(ranks))
        probe = self._new_probe()
        firsts = list(accumulate(ranks, initial=0))[:-1]
        return [
            ColocatedAddress(
                socket.gethostname(), self._reports.box, first, count, probe, self._best != "pageable"
            )
            for first, count in zip(firsts, ranks, strict=True)
        ]

    def connect(self, share: Manifest) -> list[None]:
        del share
        return [None]

    def buffer(self, index: int, nbytes: int) -> Tensor:
        if self._way is None:
            self._choose()
        slot = index % 2
        self._filled_there.discard(slot)
        if self._on_device:
            try:
                flat = self._device_slot(slot, nbytes)
            except RuntimeError as error:
                self._go_through_host(f"the trainer's GPU has no memory for two buckets ({error})")
            else:
                self._filled_there.add(slot)
                return flat
        return self._host_slot(slot, nbytes)

    def filled(self, index: int, flat: Tensor, tensors: Manifest) -> None:
        del tensors
        slot = index % 2
        if slot in self._filled_there and self._way != "ipc":
            self._host_slot(slot, len(flat)).copy_(flat, non_blocking=True)

    def start(self, index: int, flat: Tensor, tensors: Manifest) -> DevicePlace | HostPlace:
        del flat, tensors  # the receivers read the buffer itself
        if self._device.type == "cuda":
            device_memory.synchronize(self._device)
        slot = index % 2
        if slot in self._filled_there and self._way == "ipc":
            return DevicePlace(self._device_slots[slot].handle)
        held = self._host_slots[slot]
        return HostPlace(held.shared.path, len(held.shared.bytes), slot, held.serial)

    def finish(self) -> None: ...

    def end(self, version: int) -> None:
        del version
        self._drop_device_slots()
        assert self._reports is not None
        reports = [report for report in self._reports.read() if report is not None]
        refused = [report.text for report in reports if report.kind == "pageable"]
        mine = [held.pinned.refused for held in self._host_slots.values() if held.pinned.refused]
        if self._way == "registered" and (refused or mine):
            self._way = "pageable"
            who = _counted(refused, len(reports)) if refused else f"{mine[0]} (the trainer)"
            self._remark(logging.WARNING, f"slowly {_HOST}, which CUDA does not register: {who}")

    def close(self) -> None:
        self._way = None
        self._drop_probe()
        self._drop_device_slots()
        for slot in list(self._host_slots):
            self._drop_host_slot(slot)
        if self._reports is not None:
            self._reports.close()
            self._reports = None

    def take_remarks(self) -> list[Remark]:
        remarks, self._remarks = self._remarks, []
        return remarks

    def _remark(self, level: int, text: str) -> None:
        self._remarks.append(Remark(level, f"weights travel {text}"))

    def _new_probe(self) -> Probe | None:
        if self._device.type != "cuda" or self._best != "ipc":
            return None
        try:
            self._probe = probe = device_memory.DeviceBytes(_PROBE_BYTES, self._device)
            probe.bytes.copy_(torch.frombuffer(bytearray(os.urandom(_PROBE_BYTES)), dtype=torch.uint8))
            owner = device_memory.device_name(self._device)
            return Probe(probe.handle, _PROBE_BYTES, checksums(probe.bytes), owner)
        except RuntimeError as error:
            self._remark(logging.WARNING, f"{_HOST}, because the GPU's memory cannot be shared: {error}")
            return None

    def _choose(self) -> None:
        """Choose the way by the ranks' reports. A rank without a report has failed, and is left out."""
        assert self._reports is not None, "no engine has joined"
        self._drop_probe()
        self._on_device = self._device.type == "cuda"
        reports = [report for report in self._reports.read() if report is not None]
        against = [report for report in reports if report.kind != "ipc"]
        if reports and not against:
            self._way = "ipc"
            self._remark(logging.INFO, f"by CUDA IPC to all {len(reports)} ranks of the engines")
            return
        self._way = self._host_way
        if reasons := [report.text for report in against if report.text]:
            failed = any(report.kind == "failed" for report in against)
            level = logging.WARNING if failed else logging.INFO
            self._remark(level, f"{_HOST}, not by CUDA IPC: {_counted(reasons, len(reports))}")

    def _go_through_host(self, reason: str) -> None:
        self._on_device, self._way = False, self._host_way
        self._remark(logging.WARNING, f"{_HOST}, tensor by tensor: {reason}")

    def _device_slot(self, slot: int, nbytes: int) -> Tensor:
        held = self._device_slots.get(slot)
        if held is None or len(held.bytes) < nbytes:
            if held is not None:
                self._device_slots.pop(slot).close()
            held = self._device_slots[slot] = device_memory.DeviceBytes(nbytes, self._device)
        return held.bytes[:nbytes]

    def _host_slot(self, slot: int, nbytes: int) -> Tensor:
        held = self._host_slots.get(slot)
        if held is None or len(held.shared.bytes) < nbytes:
            self._drop_host_slot(slot)
            self._made += 1
            shared = SharedBytes(nbytes)
            pinned = device_memory.Pinned(shared.bytes, self._device if self._way == "registered" else None)
            held = self._host_slots[slot] = _HostSlot(shared, pinned, self._made)
        return held.shared.bytes[:nbytes]

    def _drop_host_slot(self, slot: int) -> None:
        if slot in self._host_slots:
            held = self._host_slots.pop(slot)
            held.pinned.release()
            held.shared.close()

    def _drop_probe(self) -> None:
        if self._probe is not None:
            self._probe.close()
            self._probe = None

    def _drop_device_slots(self) -> None:
        for slot in list(self._device_slots):
            self._device_slots.pop(slot).close()


@dataclass(frozen=True, slots=True)
class _HostSlot:
    shared: SharedBytes
    pinned: Pinned
    serial: int


def _counted(reasons: Sequence[str], ranks: int) -> str:
    """Each reason once, with the number of ranks that gave it."""
    return "; ".join(f"{reason} ({count} of {ranks} ranks)" for reason, count in Counter(reasons).items())
