"""Memory as a plan shows it: named parts of a process, each with its arithmetic in words. Units: bytes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from treepo.config.run import RunConfig

FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class Memory:
    """What one process holds at its peak.

    owner: as the user knows it ("trainer, pipeline stage 0"). parts: bytes by name, in display order. notes:
    the arithmetic of a part, by its name.
    """

    owner: str
    parts: Mapping[str, float]
    notes: Mapping[str, str]

    def plus(self, parts: Mapping[str, float]) -> "Memory":
        return Memory(self.owner, {**self.parts, **parts}, self.notes)

    def subtotal(self, parts: Iterable[str]) -> float:
        return sum(self.parts[part] for part in parts)

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def element_bytes(config: RunConfig) -> int:
    """Bytes of one value of `model.dtype`."""
    return {"float32": FLOAT32, "bfloat16": 2}[config.model.dtype]
