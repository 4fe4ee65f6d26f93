"""The planned model's architecture, read once: a search for proposals asks for it hundreds of times."""

from functools import cache
from pathlib import Path

from megatron_bridge.architecture import Architecture, read_architecture


@cache
def planned_architecture(folder: Path) -> Architecture:
    """`read_architecture` of a folder that does not change while it is planned. Raises ModelError."""
    return read_architecture(folder)
