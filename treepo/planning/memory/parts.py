"""Memory as a plan shows it: named parts of a process, each with its arithmetic in words. Units: bytes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from treepo.config.run import RunConfig

FLOAT32 = 4
Parts = Mapping[str, tuple[float, str]]
"""Bytes and their arithmetic ("" if there is none) by the part's name, in display order."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What one process holds at its peak. owner: as the user knows it ("trainer, pipeline stage 0")."""

    owner: str
    noted: Parts

    @property
    def parts(self) -> dict[str, float]:
        return {name: size for name, (size, _) in self.noted.items()}

    @property
    def notes(self) -> dict[str, str]:
        return {name: note for name, (_, note) in self.noted.items() if note}

    @property
    def total(self) -> float:
        return self.subtotal(self.noted)

    def subtotal(self, names: Iterable[str]) -> float:
        return sum(self.noted[name][0] for name in names)

    def plus(self, more: Parts) -> "Memory":
        return Memory(self.owner, {**self.noted, **more})


def element_bytes(config: RunConfig) -> int:
    """Bytes of one value of `model.dtype` on the plan's device."""
    return {"float32": FLOAT32, "bfloat16": 2}[model_dtype(config)]


def model_dtype(config: RunConfig) -> str:
    """`model.dtype` on the plan's device. Raises ConfigError."""
    return config.model.on(gpus=config.plan.device != "cpu").dtype
