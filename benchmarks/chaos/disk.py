"""A small file system for the run folder, which a case fills."""

import errno
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

_SIZE_MB = 400
_BALLAST = "ballast"


class SmallDisk:
    """A context manager: while it is open, `out` is a file system of `_SIZE_MB`, if `wanted`."""

    def __init__(self, out: Path, wanted: bool) -> None:
        self._out, self._wanted = out, wanted

    def __enter__(self) -> Self:
        if self._wanted:
            self._out.mkdir(parents=True)
            options = f"size={_SIZE_MB}m"
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self._out)], check=True)
        return self

    def fill(self) -> None:
        """Take all room that is left, with a file that a run does not touch."""
        block = bytes(1 << 16)
        file = os.open(self._out / f"previous-{_BALLAST}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            while block:
                block = block[: os.write(file, block)]
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        finally:
            os.close(file)

    def free(self) -> None:
        """Give the room back."""
        (self._out / f"previous-{_BALLAST}").unlink(missing_ok=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._wanted:  # the mount ends with the namespace
            self.free()
