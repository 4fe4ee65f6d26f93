"""Prompts from JSON lines and parquet."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One row, ready to sample from. id: unique in its file ("train:17", the 0-based row)."""

    id: str
    tokens: np.ndarray  # int32 [T], chat template applied
    text: str
    answer: str
    source: str
