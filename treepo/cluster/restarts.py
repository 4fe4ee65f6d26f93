"""Starts a training again after a crash, from its newest checkpoint.

A crash is any end but a finished run (exit code 0), bad input (2), Ctrl-C (130) and SIGTERM (143), or the
loss of the training's job. The number of restarts is bounded; a new checkpoint gives all of them back, so a
run that makes progress is never given up, and one that dies at the same place is.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from treepo.data.daemon_thread import in_thread
from treepo.data.folder_lock import check_free
from treepo.errors import EXIT_INTERRUPTED, ConfigError, LostJobError
from treepo.training.checkpoint_manifest import MANIFEST
from treepo.training.checkpoints import saved

EXIT_TERMINATED = 143
FINAL = frozenset({0, 2, EXIT_INTERRUPTED, EXIT_TERMINATED})
"""Exit codes after which a training is not started again."""

_FIRST_PAUSE_SECONDS = 5.0
_LONGEST_PAUSE_SECONDS = 300.0
_FREE_SECONDS = 60.0  # for a killed training's processes to end
_POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint. identity: differs from that of an earlier run's checkpoint of the same step."""

    steps: int
    identity: tuple[int, int]


def newest_saved(out: Path) -> Saved | None:
    """The newest checkpoint in the run folder, unread: the training that continues from it checks it."""
    last = saved(out)
    if last is None:
        return None
    steps, folder = last
    status = (folder / MANIFEST).stat()
    return Saved(steps, (status.st_ino, status.st_mtime_ns))


def pause_seconds(restart: int) -> float:
    """The back-off before restart 1, 2, ... without a new checkpoint: 5, 10, 20 s, and so on up to 300 s."""
    return min(_FIRST_PAUSE_SECONDS * 2 ** min(restart - 1, 16), _LONGEST_PAUSE_SECONDS)


async def with_restarts(
    attempt: Callable[[bool], Awaitable[int]],
    saved: Callable[[], Awaitable[Saved | None]],
    say: Callable[[str], None],
    *,
    most: int,
    resume: bool,
) -> int:
    """Train until the training ends for good, and return its exit code.

    attempt: starts the training, with --resume if true, and returns its exit code or raises LostJobError.
    saved: the newest checkpoint. most: restarts without a new checkpoint in between. resume: of the first
    start. Raises LostJobError if the training is lost and has no restart left.
    """
    # A new run sets an earlier run's checkpoints aside. Until it has done so, they are not its own.
    first = last = await saved()
    used = 0
    while True:
        code = None
        try:
            code = await attempt(resume)
        except LostJobError as error:
            reason = str(error)
        else:
            if code in FINAL:
                return code
            reason = f"the training ended with exit code {code}"
        now = await saved()
        if now != last:
            used = 0
        last = now
        if used == most:
            end = f"{reason}; it is not started again after {most} restarts without a new checkpoint"
            if code is None:
                raise LostJobError(end if most else reason)
            if most:
                say(end)
            return code
        used += 1
        resume = resume or now != first
        origin = "the beginning" if now is None or not resume else f"the checkpoint of step {now.steps}"
        pause = pause_seconds(used)
        say(f"{reason}; restart {used} of {most} in {pause:g} s, from {origin}")
        await asyncio.sleep(pause)


async def wait_until_free(out: Path) -> None:
    """Wait until no process writes into the run folder. Raises ConfigError after `_FREE_SECONDS`."""
    deadline = asyncio.get_running_loop().time() + _FREE_SECONDS
    while True:
        try:
            return await in_thread(lambda: check_free(out))
        except ConfigError:
            if asyncio.get_running_loop().time() > deadline:
                raise
        await asyncio.sleep(_POLL_SECONDS)
