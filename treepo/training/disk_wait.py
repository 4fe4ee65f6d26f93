"""Waits for a disk that does not take what a run writes: full, read-only, slow, not there.

The run pauses rather than loses anything, for `disk_seconds`; then it ends with one line, and `--resume`
continues it from its newest checkpoint.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from treepo.data.background_writer import BufferedFile, FolderGoneError, how_to_go_on
from treepo.errors import CheckpointError, DiskError

_SLOW_SECONDS = 30.0  # until a write that has not returned is told
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0  # seconds between attempts
_RESUME = "--resume continues from the newest checkpoint once it can be written"
_log = logging.getLogger(__name__)


class DiskWait:
    """seconds: how long each wait lasts at most, from the first failure."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    async def until_written(self, files: Sequence[BufferedFile]) -> None:
        """Wait until a BackgroundWriter has written the files. Raises DiskError."""
        pause, slow_told = 0.002, False
        while late := [file for file in files if file.waiting or file.failure is not None]:
            for file in late:
                slow_told = self._check(file, slow_told)
            await asyncio.sleep(pause)
            pause = min(2 * pause, 0.5)

    def _check(self, file: BufferedFile, slow_told: bool) -> bool:
        """Raise DiskError if the file is late for too long. Returns whether a slow disk has been told."""
        if isinstance(file.failure, FolderGoneError):
            raise DiskError(f"{file.failure}: its checkpoints are gone, and nothing can be resumed")
        since = file.waiting_since if file.failure is None else file.failing_since
        seconds = time.monotonic() - since
        waiting = f"{file.path}: {file.reason}"
        if seconds > self._seconds:
            raise DiskError(
                f"{waiting}, for {self._seconds:g} s (disk_seconds); {file.waiting} bytes are not written; "
                f"{_RESUME}"
            )
        if file.failure is None and seconds > _SLOW_SECONDS and not slow_told:
            then = how_to_go_on(self._seconds, since)
            _log.warning("%s; %d bytes wait in memory; %s", waiting, file.waiting, then)
            return True
        return slow_told

    async def until_done[T](self, attempt: Callable[[], Awaitable[T]], what: str) -> T:
        """Call `attempt` until it raises neither OSError nor CheckpointError, and return its result.

        what: what is written, for the lines. Raises DiskError.
        """
        began, pause, told = 0.0, _FIRST_PAUSE, ""
        while True:
            try:
                result = await attempt()
            except (OSError, CheckpointError) as error:
                reason = _reason(error, what)
                began = began or time.monotonic()
                left = self._seconds - (time.monotonic() - began)
                if left <= 0:
                    raise DiskError(f"{reason}, for {self._seconds:g} s (disk_seconds); {_RESUME}") from None
                if reason != told:
                    told = reason
                    then = how_to_go_on(self._seconds, began)
                    _log.warning("%s; %s", reason, then)
                await asyncio.sleep(min(pause, left))
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                if told:
                    _log.warning("%s is written, after %.0f s", what, time.monotonic() - began)
                return result


def _reason(error: OSError | CheckpointError, what: str) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or what}: {error.strerror or error}"
    return str(error)
