"""An engine rank's end of the colocated transport: tries the trainer's GPU memory, and fetches buckets."""

import socket
from dataclasses import dataclass

import torch
from torch import Tensor

from treepo.weight_sync import device_memory
from treepo.weight_sync.shared_memory import Report, ReportBox, map_bytes
from treepo.weight_sync.wire import Bucket, Reads, Shards, Stripes, checksums


@dataclass(frozen=True, slots=True)
class DevicePlace:
    """A bucket in the GPU's memory, which opens by its handle."""

    handle: bytes


@dataclass(frozen=True, slots=True)
class HostPlace:
    """A bucket in host memory. mapped: bytes at `path`. serial: of the buffer, because paths are reused."""

    path: str
    mapped: int
    slot: int
    serial: int


@dataclass(frozen=True, slots=True)
class Probe:
    """GPU memory that a rank opens to learn whether it can. owner: the GPU's UUID."""

    handle: bytes
    nbytes: int
    checksums: tuple[int, ...]
    owner: str


@dataclass(frozen=True, slots=True)
class ColocatedAddress:
    """box: where the ranks of all engines report. first: the writer number of the engine's rank 0. ranks: of
    the engine. probe: None if buckets go through host memory. registers: whether CUDA is to register that.
    """

    host: str
    box: ReportBox
    first: int
    ranks: int
    probe: Probe | None
    registers: bool

    def join(self, rank: int, device: torch.device, reads: Reads) -> "ColocatedReceiver":
        del reads  # through host memory a rank copies no more than that anyway
        if socket.gethostname() != self.host:
            raise RuntimeError(
                f"weights.transport = colocated: the trainer is on {self.host}, this engine on "
                f"{socket.gethostname()}; broadcast and disk work between machines"
            )
        report = self._try(device)
        try:
            self.box.write(self.first + rank, report)
        except RuntimeError as error:
            raise RuntimeError(
                f"weights.transport = colocated: this engine cannot open the trainer's memory ({error}): "
                "both need the same process namespace; host_broadcast and disk do without"
            ) from error
        return ColocatedReceiver(device, self, rank)

    def _try(self, device: torch.device) -> Report:
        """Report whether this rank takes weights from the GPU's memory, and if not, why."""
        if self.probe is None:
            return Report("host")
        if device.type != "cuda":
            return Report("host", "it computes on the CPU")
        probe, mine = self.probe, device_memory.device_name(device)
        if reason := device_memory.reason_against_opening(probe.owner, mine):
            return Report("host", reason)
        try:
            found = checksums(device_memory.copy_from_handle(probe.handle, probe.nbytes, device))
        except RuntimeError as error:
            return Report("failed", str(error))
        return Report("ipc") if found == probe.checksums else Report("failed", "it reads other bytes there")


class ColocatedReceiver:
    """Copies a bucket from the GPU's memory, or maps each buffer in host memory once."""

    part: int = 0
    shards: Shards | None = None

    def __init__(self, device: torch.device, address: ColocatedAddress, rank: int) -> None:
        self._device, self._address, self._rank = device, address, rank
        self._mapped: dict[int, tuple[HostPlace, device_memory.Pinned]] = {}  # by slot

    def begin(self, bucket: Bucket) -> None: ...

    def receive(self, bucket: Bucket) -> Tensor:
        """On the device; but in host memory if the engine has several ranks and needs slices of it."""
        place = bucket.location
        if isinstance(place, DevicePlace):
            return device_memory.copy_from_handle(place.handle, bucket.nbytes, self._device)
        assert isinstance(place, HostPlace)
        flat = self._map(place)[: bucket.nbytes]
        return flat if self._address.ranks > 1 else device_memory.to_device(flat, self._device)

    def stripes(self, bucket: Bucket) -> Stripes:
        if isinstance(bucket.location, DevicePlace):
            return slice(None)
        return slice(self._rank % len(bucket.checksums[0]), None, self._address.ranks)

    def end(self) -> None:
        if self._device.type == "cuda":
            device_memory.release_unused()  # the bucket's memory; the engine's cache may need it

    def close(self) -> None:
        for _, pinned in self._mapped.values():
            pinned.release()
        self._mapped.clear()

    def _map(self, place: HostPlace) -> Tensor:
        if place.slot in self._mapped:
            known, pinned = self._mapped[place.slot]
            if known == place:
                return pinned.host
            pinned.release()
        registers = self._device.type == "cuda" and self._address.registers
        pinned = device_memory.Pinned(
            map_bytes(place.path, place.mapped), self._device if registers else None
        )
        self._mapped[place.slot] = place, pinned
        if pinned.refused:
            report = Report("pageable", pinned.refused)
            self._address.box.write(self._address.first + self._rank, report)
        return pinned.host
