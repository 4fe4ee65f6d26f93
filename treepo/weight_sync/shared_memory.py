"""Memory that processes of one machine share: bytes, and the reports of other processes.

The memory has no name in a file system: other processes open it through its owner. The kernel frees it when
the last process that maps it ends, even if it is killed.
"""

import os
import pickle
from dataclasses import dataclass

import torch
from torch import Tensor

_REPORT_BYTES = 4096  # for each report; a longer text is truncated


class SharedBytes:
    """Memory of this process that other processes on the machine can map by its `path`."""

    def __init__(self, nbytes: int) -> None:
        self._descriptor = os.memfd_create("treepo")
        os.ftruncate(self._descriptor, nbytes)
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        self.bytes = map_bytes(self.path, nbytes)

    def close(self) -> None:
        """Allow no further mapping. A process that has the memory mapped keeps it."""
        os.close(self._descriptor)


def map_bytes(path: str, nbytes: int) -> Tensor:
    """Map the shared memory at `path`: uint8 [nbytes]. Raises RuntimeError if its process has ended."""
    return torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class Report:
    """What one process says to the owner of the memory. kind: for the owner's code. text: for a person."""

    kind: str
    text: str = ""


@dataclass(frozen=True, slots=True)
class ReportBox:
    """Where reports are left, one for each of `count` writers. It is sent to the writers."""

    path: str
    count: int

    def write(self, writer: int, report: Report) -> None:
        """Replace the writer's report. Raises RuntimeError if the owner has ended."""
        text = pickle.dumps(Report(report.kind, report.text[: _REPORT_BYTES // 5]))  # a character: 4 bytes
        place = map_bytes(self.path, self.count * _REPORT_BYTES).view(self.count, _REPORT_BYTES)[writer]
        place[4 : 4 + len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        place[:4].view(torch.int32)[0] = len(text)


class Reports:
    """The owner's side of a `ReportBox`."""

    def __init__(self, count: int) -> None:
        self._shared = SharedBytes(count * _REPORT_BYTES)
        self.box = ReportBox(self._shared.path, count)

    def read(self) -> list[Report | None]:
        """Each writer's last report, None if it has left none. No writer may be writing."""
        places = self._shared.bytes.view(self.box.count, _REPORT_BYTES)
        lengths = [int(place[:4].view(torch.int32)) for place in places]
        return [
            pickle.loads(place[4 : 4 + length].numpy().tobytes()) if length else None
            for place, length in zip(places, lengths, strict=True)
        ]

    def close(self) -> None:
        self._shared.close()
