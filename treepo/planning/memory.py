"""Memory as a plan shows it: named parts, each with the arithmetic behind it. Units: bytes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from treepo.config.run import RunConfig


@dataclass(frozen=True, slots=True)
class Memory:
    """What one process holds at its fullest. owner: as the user knows it ("trainer, pipeline stage 0").

    parts: bytes by name, in the order of showing. notes: by part's name, the arithmetic in a few words.
    """

    owner: str
    parts: Mapping[str, float]
    notes: Mapping[str, str]

    def plus(self, parts: Mapping[str, float], notes: Mapping[str, str]) -> "Memory":
        """With further parts."""
        return Memory(self.owner, {**self.parts, **parts}, {**self.notes, **notes})

    def held(self, parts: Iterable[str]) -> float:
        """Bytes of some parts."""
        return sum(self.parts[part] for part in parts)

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def element_bytes(config: RunConfig) -> int:
    """Of one value of the model's dtype."""
    return {"float32": 4, "bfloat16": 2}[config.model.dtype]
