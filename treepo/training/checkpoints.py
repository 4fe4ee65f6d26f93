"""The training checkpoints of a run: `checkpoints/step-00010/` and the like in its folder.

The trainer writes them (`treepo.training.checkpoint_manifest` says what is in one) while the next step is sampled; here
it is decided when, what of the run goes along, and which ones stay.
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from treepo.config.checkpoint import CheckpointConfig
from treepo.training.checkpoint_manifest import is_checkpoint, read_manifest

CHECKPOINTS = "checkpoints"
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True, slots=True)
class RunState:
    """What a run goes on from, besides the trainer's own state.

    cursor: of the order of prompts. data: fingerprint of the prompts' file. sizes: bytes of the files that
    grow, by name, as they were after the step. The rest as in the run's summary, up to the step.
    """

    step: int
    cursor: int
    data: str
    sizes: Mapping[str, int]
    accuracy_before: float | None
    decoded_tokens: int
    sequential_tokens: int
    max_difference: float
    seconds: float
    phase_seconds: Mapping[str, float]


class Saver(Protocol):
    """Who writes the trainer's state: `treepo.cluster.trainer_group.TrainerGroup`."""

    async def save(self, folder: Path, run: Mapping[str, Any]) -> None: ...

    async def finish_save(self) -> None: ...


class Checkpoints:
    """Writes a run's checkpoints, one at a time. out: the run folder; steps: how many the run will have."""

    def __init__(self, out: Path, config: CheckpointConfig, steps: int, saver: Saver) -> None:
        self._folder = out.resolve() / CHECKPOINTS
        self._config, self._steps, self._saver = config, steps, saver
        self._writing = False

    def due(self, step: int) -> bool:
        """Whether there is to be a checkpoint after this step."""
        every = self._config.every
        return every is not None and (step % every == 0 or step == self._steps)

    async def begin(self, state: RunState) -> None:
        """Start to write one; training may go on. Raises CheckpointError."""
        await self._saver.save(self._folder / f"step-{state.step:05d}", asdict(state))
        self._writing = True

    async def finish(self) -> None:
        """What was begun, if anything, is there; older ones go. Raises CheckpointError."""
        if not self._writing:
            return
        self._writing = False
        await self._saver.finish_save()
        if self._config.keep is not None:
            for _, folder in _all(self._folder)[: -self._config.keep]:
                _remove(folder)


def newest(out: Path) -> tuple[Path, RunState] | None:
    """The last checkpoint of the run in folder `out`. Raises ModelError where it is not readable."""
    if not (checkpoints := _all(out / CHECKPOINTS)):
        return None
    _, folder = checkpoints[-1]
    return folder, RunState(**read_manifest(folder).run)


def discard_leftovers(out: Path) -> None:
    """Remove what a killed run left half-written or half-removed."""
    for entry in (out / CHECKPOINTS).glob(".step-*"):
        shutil.rmtree(entry)


def _all(folder: Path) -> list[tuple[int, Path]]:
    """By step, the first one first."""
    entries = folder.iterdir() if folder.is_dir() else ()
    named = ((_NAME.fullmatch(entry.name), entry) for entry in entries)
    return sorted((int(match[1]), entry) for match, entry in named if match and is_checkpoint(entry))


def _remove(folder: Path) -> None:
    """Hidden first: a kill leaves no checkpoint with files missing."""
    hidden = folder.with_name(f".{folder.name}.removed")
    folder.rename(hidden)
    shutil.rmtree(hidden)
