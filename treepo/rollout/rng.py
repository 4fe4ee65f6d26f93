"""Randomness by name: a generator depends on its purpose, never on the order of the draws.

A tree draws from `generator(seed, step, prompt_id, purpose, round)`, so the same seed gives the same tree in
whatever order the engine answers. Philox is counter-based: generators with different keys are independent
streams.
"""

import hashlib
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence


def key(*names: int | str) -> int:
    """A 128-bit integer that identifies `names`; equal names give equal keys on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(repr, names)).encode(), digest_size=16)
    return int.from_bytes(digest.digest(), "big")


def generator(*names: int | str) -> np.random.Generator:
    """The random stream that belongs to `names`."""
    state: Any = _Key(key(*names))  # numpy takes any ISeedSequence, but its annotation names one of them
    return np.random.Generator(np.random.Philox(state))


class _Key(ISeedSequence):
    """The key of a Philox. `Philox(key=...)` also asks the system for a seed, which takes twice as long."""

    def __init__(self, value: int) -> None:
        self._value = value

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        assert n_words == 2
        assert dtype is np.uint64
        return np.array([self._value & (1 << 64) - 1, self._value >> 64], dtype=np.uint64)


def seed(*names: int | str) -> int:
    """A 31-bit seed that belongs to `names`, for libraries that take an integer."""
    return key(*names) & 0x7FFFFFFF
