"""A part of a step's time. Seconds."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Phase:
    """note: the arithmetic, in a few words."""

    seconds: float
    note: str
