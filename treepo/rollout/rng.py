"""Randomness by name: a generator depends on its purpose, never on the order of the draws.

A tree draws from `generator(seed, step, prompt_id, purpose, round)`, so the same seed gives the same tree in
whatever order the engine answers. Philox is counter-based: generators with different keys are independent
streams.
"""

import hashlib

import numpy as np


def key(*names: int | str) -> int:
    """A 128-bit integer that identifies `names`; equal names give equal keys on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(repr, names)).encode(), digest_size=16)
    return int.from_bytes(digest.digest(), "big")


def generator(*names: int | str) -> np.random.Generator:
    """The random stream that belongs to `names`."""
    return np.random.Generator(np.random.Philox(key=key(*names)))


def seed(*names: int | str) -> int:
    """A 31-bit seed that belongs to `names`, for libraries that take an integer."""
    return key(*names) & 0x7FFFFFFF
