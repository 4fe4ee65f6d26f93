"""The parts of the page, in the order of their tabs."""

from collections.abc import Sequence

from treepo.view.part import Part
from treepo.view.run import run_part
from treepo.view.sources import Source
from treepo.view.trees import trees_part

_PARTS = (run_part, trees_part)


def open_parts(sources: Sequence[Source]) -> list[Part]:
    """Make each part of the sources."""
    return [make(sources) for make in _PARTS]
