"""Writes the files of a distributed checkpoint, computes their checksums meanwhile, and reads them back."""

import errno
import io
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from megatron_bridge import progress
from treepo.training.checkpoint_manifest import checksum


class CheckedWriter(FileSystemWriter):
    """Writes one rank's files. A file that the disk returns otherwise than it was written is an OSError.

    A failure leaves its frames empty: torch keeps it in a reference cycle with them, and they hold views of
    buffers, on which the garbage collector of Python 3.12.1 crashes.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fs: _HashedFiles = _HashedFiles()

    @property
    def checksums(self) -> dict[str, str]:
        """Of this rank's files, by name."""
        return {file.name: value for file, value in self.fs.checksums.items()}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        try:
            results = super().write_data(plan, planner)
            self.fs.read_back()
        except OSError as error:
            earlier: BaseException | None = error
            while earlier is not None:
                traceback.clear_frames(earlier.__traceback__)
                earlier = earlier.__context__
            raise
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        self.fs.read_back()


class _HashedFiles(FileSystem):
    """Torch's access to files. checksums: of each file that was written, by path."""

    def __init__(self) -> None:
        self.checksums: dict[Path, str] = {}
        self._unread: set[Path] = set()

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        assert mode == "wb", mode
        with _HashedFile(Path(path)) as stream:
            yield stream
        self.checksums[Path(path)] = stream.checksum()
        self._unread.add(Path(path))

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.checksums[Path(new_path)] = self.checksums.pop(Path(path))
        self._unread.remove(Path(path))
        self._unread.add(Path(new_path))

    def read_back(self) -> None:
        """Read what was written since the last call. Raises OSError if it is not the same."""
        while self._unread:
            path = self._unread.pop()
            read_back(path, self.checksums[path])


class _HashedFile(io.BufferedWriter):
    """A new file, written from its beginning to its end."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self._hash = xxhash.xxh3_128()

    def write(self, buffer: Any) -> int:
        progress.count()
        self._hash.update(buffer)
        return super().write(buffer)

    def checksum(self) -> str:
        """Of all that was written, whatever reached the file."""
        return self._hash.hexdigest()


def read_back(path: Path, expected: str) -> None:
    """Read a file from the disk, not from memory. Raises OSError if its checksum is not the expected one."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # only what is on the disk can be dropped from memory
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    if checksum(path, progress.count) != expected:
        raise OSError(errno.EIO, "the disk returns another content than was written", str(path))
