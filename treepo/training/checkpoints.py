"""The training checkpoints of a run: `checkpoints/step-00010/` and so on in its folder.

Decides when one is due and which ones are kept. The trainer writes a checkpoint while the next step is
sampled; `treepo.training.checkpoint_manifest` describes the folder.
"""

import asyncio
import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any, Protocol

from treepo.config.checkpoint import CheckpointConfig
from treepo.data.daemon_thread import in_thread
from treepo.errors import ModelError
from treepo.training.best_step import BestStep
from treepo.training.checkpoint_manifest import (
    MANIFEST,
    NAME,
    OtherFormatError,
    is_checkpoint,
    read_manifest,
    verified_manifest,
)
from treepo.training.disk_wait import DiskWait
from treepo.training.run_state import RunState

CHECKPOINTS = "checkpoints"
_POLL_SECONDS = 0.5  # between two questions whether the trainer has written a checkpoint
_log = logging.getLogger(__name__)


class Saver(Protocol):
    """The part of `treepo.protocols.Trainer` that writes checkpoints."""

    async def save(self, folder: Path, run: Mapping[str, Any], ready_trees: bytes) -> None: ...

    async def save_written(self) -> bool: ...

    async def finish_save(self) -> None: ...


class Checkpoints:
    """Writes a run's checkpoints, one at a time, and removes those that are neither among the newest nor the
    best.

    out: the run folder. steps: total steps of the run. best: which one is; None: the newest alone are kept.
    """

    def __init__(
        self,
        out: Path,
        config: CheckpointConfig,
        steps: int,
        saver: Saver,
        disk: DiskWait,
        best: BestStep | None = None,
    ) -> None:
        self._folder = out.resolve() / CHECKPOINTS
        self._config, self._steps, self._saver, self._disk = config, steps, saver, disk
        self._best = best
        self._begun: tuple[_Begun, asyncio.Task[None]] | None = None
        self._settling = asyncio.Lock()

    def due(self, step: int) -> bool:
        """Whether a checkpoint follows this step, as the last one or as one that may be the best."""
        every = self._config.every
        if every is None:
            return False
        return step % every == 0 or step == self._steps or (self._best is not None and self._best.due(step))

    async def mark_best(self) -> None:
        """Mark the best of the complete checkpoints, if it is of interest."""
        async with self._settling:
            await in_thread(self._mark_best)

    async def settle(self) -> None:
        """Mark the best of the complete checkpoints, and remove those that are not kept."""
        async with self._settling:
            await in_thread(self._settle)

    async def evaluated(self, step: int, metrics: Mapping[str, float]) -> int | None:
        """Note what an evaluation of the weights after `step` has found. Returns the best step so far; None
        without one.
        """
        if self._best is None:
            return None
        self._best.evaluated(step, metrics)
        await self.mark_best()
        begun = () if self._begun is None else (self._begun[0].run["steps_done"],)
        return self._best.of({*begun, *(each for each, _ in _with_manifest(self._folder))})

    async def best(self) -> tuple[int, float, Path] | None:
        """Step, accuracy and folder of the best checkpoint that is whole; None if there is none.

        A damaged one is passed over with a warning.
        """
        return None if self._best is None else await in_thread(self._whole_best)

    async def begin(self, state: RunState, ready_trees: bytes = b"") -> None:
        """Begin a checkpoint, which is completed as soon as it is written; sampling may go on meanwhile.

        ready_trees: the content of its file of this name. A checkpoint that cannot be written is tried again,
        so the trainer must not change until `finish` has returned. Raises DiskError.
        """
        folder = self._folder / f"step-{state.steps_done:05d}"
        begun = _Begun(folder, asdict(state), ready_trees)
        await self._disk.until_done(lambda: self._save(begun), str(folder))
        self._begun = begun, asyncio.create_task(self._complete_once_written(begun))

    async def finish(self) -> None:
        """Return when a checkpoint that was begun is complete and older ones are removed. Raises
        DiskError.
        """
        if self._begun is None:
            return
        begun, completion = self._begun
        begun.awaited.set()
        await completion
        self._begun = None

    async def cancel(self) -> None:
        """Leave a checkpoint that was begun as it is."""
        if self._begun is not None:
            self._begun[1].cancel()
            await asyncio.gather(self._begun[1], return_exceptions=True)

    async def _complete_once_written(self, begun: "_Begun") -> None:
        """Until the files are written, the ranks stay free for other calls, as of an engine that restarts."""
        while begun.writing and not begun.awaited.is_set() and not await self._saver.save_written():
            with suppress(TimeoutError):
                await asyncio.wait_for(begun.awaited.wait(), _POLL_SECONDS)
        await self._disk.until_done(lambda: self._complete(begun), str(begun.folder))
        await self.settle()

    async def _save(self, begun: "_Begun") -> None:
        begun.writing = False
        # The run folder is never made again: if it is gone, its disk may be, and the place is another disk.
        await in_thread(lambda: self._folder.mkdir(exist_ok=True))
        await self._saver.save(begun.folder, begun.run, begun.ready_trees)
        begun.writing = True

    async def _complete(self, begun: "_Begun") -> None:
        if not begun.writing:
            await self._save(begun)
        begun.writing = False
        await self._saver.finish_save()

    def _mark_best(self) -> int | None:
        """Returns the best step. A mark that cannot be written is a warning, and is tried again later."""
        if self._best is None:
            return None
        step = self._best.of(each for each, _ in _with_manifest(self._folder))
        try:
            self._best.mark(self._folder, step)
        except OSError as error:
            _log.warning("the best checkpoint is not marked: %s: %s", error.filename, error.strerror)
        return step

    def _settle(self) -> None:
        """One that cannot be removed is a warning, and is tried again after the next checkpoint."""
        best = self._mark_best()
        if self._config.keep is None:
            return
        for step, folder in _with_manifest(self._folder)[: -self._config.keep]:
            if step == best:
                continue
            try:
                _remove(folder)
            except OSError as error:
                _log.warning("%s cannot be removed: %s: %s", folder, error.filename, error.strerror)

    def _whole_best(self) -> tuple[int, float, Path] | None:
        assert self._best is not None
        folders = dict(_with_manifest(self._folder))
        while (step := self._best.of(folders)) is not None:
            folder = folders.pop(step)
            try:
                verified_manifest(folder)
            except ModelError as error:
                _log.warning("%s; %s, the best checkpoint, is passed over", error, folder.name)
            else:
                return step, self._best.accuracy(step), folder
        return None


@dataclass(slots=True)
class _Begun:
    """A checkpoint that is not complete. writing: whether the trainer has copied its state and writes it.
    awaited: set once training waits for it.
    """

    folder: Path
    run: Mapping[str, Any]
    ready_trees: bytes
    writing: bool = False
    awaited: asyncio.Event = field(default_factory=asyncio.Event)


def newest(out: Path, *, contents: bool = True) -> tuple[Path, RunState] | None:
    """Find the last whole checkpoint of the run in folder `out`; None if the run has none at all.

    contents: whether to read all files of a checkpoint; else only their sizes are compared. One that is
    damaged is passed over with a warning; `discard_leftovers` moves it aside. Raises ModelError if every one
    is, or if another version of treepo wrote one.
    """
    checkpoints = _all(out / CHECKPOINTS)
    for _, folder in reversed(checkpoints):
        try:
            return folder, _state_of(folder, contents)
        except OtherFormatError:
            raise
        except ModelError as error:
            _log.warning("%s; %s is passed over", error, folder.name)
    if checkpoints:
        raise ModelError(
            f"{out / CHECKPOINTS}: none of {len(checkpoints)} checkpoints is whole; without --resume the run "
            "begins again, and its files move to another folder"
        )
    return None


def _state_of(folder: Path, contents: bool) -> RunState:
    """The run's state in a checkpoint. Raises ModelError if the checkpoint is not whole."""
    manifest = verified_manifest(folder) if contents else read_manifest(folder)
    if not manifest.checksums:
        _log.warning("%s is of an earlier version: it has no checksums, and only sizes are compared", folder)
    try:
        return RunState.of_manifest(manifest.run)
    except ValueError as error:
        raise ModelError(f"{folder / MANIFEST}: run: {error}") from None


def instead_of(folder: Path) -> str:
    """What can be used in the place of a damaged checkpoint of a run; empty if the folder is none."""
    if NAME.fullmatch(folder.name) is None or not folder.is_dir() or _is_whole(folder):
        return ""
    others = (other for _, other in reversed(_all(folder.parent)) if other.name != folder.name)
    whole = next((other for other in others if _is_whole(other)), None)
    return "; no other checkpoint of its run is whole" if whole is None else f"; {whole} is whole"


def _is_whole(folder: Path) -> bool:
    try:
        verified_manifest(folder)
    except ModelError:
        return False
    return True


def saved(out: Path) -> tuple[int, Path] | None:
    """Step and folder of the last checkpoint of the run in folder `out`, unread; None if there is none."""
    checkpoints = _with_manifest(out / CHECKPOINTS)
    return checkpoints[-1] if checkpoints else None


def saved_step(out: Path) -> int | None:
    """As `saved`, the step alone."""
    last = saved(out)
    return None if last is None else last[0]


def discard_leftovers(out: Path, step: int) -> None:
    """Make way for a run that continues after `step`: remove what a killed run left half-written or
    half-removed, and rename the damaged checkpoints of later steps, `step-00012.damaged`.
    """
    for entry in (out / CHECKPOINTS).glob(".step-*"):
        shutil.rmtree(entry)
    for later, folder in _all(out / CHECKPOINTS):
        if later > step:
            folder.rename(_free(folder.with_name(f"{folder.name}.damaged")))


def _all(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of all checkpoints, also of damaged ones, in the order of steps."""
    entries = folder.iterdir() if folder.is_dir() else ()
    named = ((NAME.fullmatch(entry.name), entry) for entry in entries)
    return sorted((int(match[1]), entry) for match, entry in named if match and entry.is_dir())


def _with_manifest(folder: Path) -> list[tuple[int, Path]]:
    """As `_all`, without folders that have no manifest."""
    return [(step, entry) for step, entry in _all(folder) if is_checkpoint(entry)]


def _free(path: Path) -> Path:
    """The path, or with the first number at its end that no entry has."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return next(each for each in chain([path], numbered) if not each.exists())


def _remove(folder: Path) -> None:
    """Hide the folder first, so that a kill leaves no checkpoint with missing files."""
    hidden = folder.with_name(f".{folder.name}.removed")
    folder.rename(hidden)
    shutil.rmtree(hidden)
