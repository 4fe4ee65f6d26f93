"""What a run will need and how fast it will be, without a GPU; and where it does not fit, what would."""

import time
from collections.abc import Iterator
from pathlib import Path

from megatron_bridge.architecture import read_architecture
from treepo.config.schema import RunConfig
from treepo.planning.fit import Fit, fit
from treepo.planning.layouts import Neighbour, neighbours

_PROPOSALS = 3
_SEARCH_SECONDS = 20.0


def proposals(config: RunConfig, folder: Path) -> Iterator[tuple[Neighbour, Fit]]:
    """The nearest layouts that fit, each with a change that no other one needs; as many as are found in time."""
    found: list[Neighbour] = []
    deadline = time.monotonic() + _SEARCH_SECONDS
    for neighbour in neighbours(config, read_architecture(folder)):
        if len(found) == _PROPOSALS or time.monotonic() > deadline:
            return
        if any(neighbour.contains(other) for other in found):
            continue
        fitted = fit(neighbour.config, folder)
        if fitted.problem is None:
            found.append(neighbour)
            yield neighbour, fitted
