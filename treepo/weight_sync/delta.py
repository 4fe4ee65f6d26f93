"""What changed between two versions of a bucket, compressed: small where most weights keep all their bits.

At the learning rates of reinforcement learning a step changes a few of a hundred bfloat16 weights, most of
them by the last bit. A delta names the 16-bit words that differ, and the exclusive or of old and new. Applied
to the old bytes it gives the new ones bit for bit, whatever the tensors' types are.

    8 bytes     magic
    8 bytes     number of stripes
    stripes     of 16 MiB of the bucket: 3 numbers of 8 bytes (below), then the compressed part of each

A stripe's part has, for each word that it names, the distance from the one before (1 or 2 bytes), the low
byte of the exclusive or, and its high byte; all of one kind are together. So that a distance fits, every
255th (or 65,535th) word is named too, changed or not. The three numbers of a stripe: bytes of the compressed
part, words, bytes of a distance.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow
import torch
from torch import Tensor

_MAGIC = b"treepo-1"
_STRIPE = 16 << 20
_LEVEL = 1  # of zstd: higher ones take several times as long for a few percent
_THREADS = 4
_REACH = {1: 0xFF, 2: 0xFFFF}  # the largest distance, by its bytes


@dataclass(frozen=True, slots=True)
class _Part:
    """A stripe of a delta. bytes: compressed. words: that are named. width: bytes of a distance."""

    bytes: int
    words: int
    width: int


def encode(old: np.ndarray, new: np.ndarray) -> bytes:
    """The delta from the bytes of `old` to those of `new`: both uint8 [bytes], of the same length."""
    assert len(old) == len(new)
    starts = range(0, len(new), _STRIPE)
    with ThreadPoolExecutor(_THREADS) as threads:
        parts = list(threads.map(lambda at: _encode(old[at : at + _STRIPE], new[at : at + _STRIPE]), starts))
    numbers = np.array([(part.bytes, part.words, part.width) for part, _ in parts], dtype="<i8")
    count = len(parts).to_bytes(8, "little")
    return b"".join([_MAGIC, count, numbers.tobytes(), *(packed for _, packed in parts)])


def apply(delta: bytes, flat: Tensor) -> None:
    """Turn the old bytes in `flat` into the new ones. flat: uint8 [bytes], even and aligned to words.

    A bucket of an odd number of bytes has one more here. Raises ValueError for what is no delta of `flat`.
    """
    words = flat.view(torch.int16)
    with ThreadPoolExecutor(_THREADS) as threads:
        parts = threads.map(lambda part: _decode(*part), _parts(delta, len(flat)))
        for start, (places, changes) in zip(range(0, len(words), _STRIPE // 2), parts, strict=True):
            within = words[start : start + _STRIPE // 2]
            if not len(places):
                continue
            if places[-1] >= len(within):
                raise ValueError(f"a delta names word {places[-1]} of a stripe of {len(within)}")
            at = torch.from_numpy(places).to(flat.device)
            within[at] ^= torch.from_numpy(changes).to(flat.device)


def _encode(old: np.ndarray, new: np.ndarray) -> tuple[_Part, bytes]:
    before, after = _words(old), _words(new)
    named = before != after
    changed = int(np.count_nonzero(named))
    sizes = {width: (width + 2) * (changed + len(named) // reach) for width, reach in _REACH.items()}
    width = min(sizes, key=sizes.__getitem__)
    if changed:
        named[:: _REACH[width]] = True
    places = np.flatnonzero(named)
    distances = np.diff(places, prepend=0).astype(f"<u{width}")
    changes = (before[places] ^ after[places]).view(np.uint8)
    plain = np.concatenate([distances.view(np.uint8), changes[0::2], changes[1::2]])
    packed = pyarrow.Codec("zstd", _LEVEL).compress(plain, asbytes=True)
    return _Part(len(packed), len(places), width), packed


def _decode(part: _Part, packed: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The places of words in a stripe, ascending (int64), and the exclusive or at each (int16)."""
    size = part.words * (part.width + 2)
    try:
        plain = np.frombuffer(pyarrow.Codec("zstd").decompress(packed, size, asbytes=True), dtype=np.uint8)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"a delta is damaged: {error}") from error
    if len(plain) != size:
        raise ValueError(f"a delta is damaged: {len(plain)} bytes in place of {size}")
    distances, low, high = np.split(plain, [part.words * part.width, part.words * (part.width + 1)])
    places = np.cumsum(distances.view(f"<u{part.width}"), dtype=np.int64)
    return places, (low.astype(np.uint16) | high.astype(np.uint16) << 8).view(np.int16)


def _parts(delta: bytes, nbytes: int) -> Iterator[tuple[_Part, bytes]]:
    """The stripes of a delta between buckets of `nbytes` bytes. Raises ValueError if it is damaged."""
    count = -(-nbytes // _STRIPE)
    start = len(_MAGIC) + 8 + 24 * count
    if delta[:8] != _MAGIC or int.from_bytes(delta[8:16], "little") != count or len(delta) < start:
        raise ValueError(f"it is not the delta of {nbytes} bytes")
    for packed_bytes, words, width in np.frombuffer(delta[16:start], dtype="<i8").reshape(-1, 3).tolist():
        if (
            not 0 <= words <= _STRIPE // 2
            or width not in _REACH
            or not 0 <= packed_bytes <= len(delta) - start
        ):
            raise ValueError("a delta is damaged: its numbers fit no stripe")
        yield _Part(packed_bytes, words, width), delta[start : start + packed_bytes]
        start += packed_bytes
    if start != len(delta):
        raise ValueError(f"a delta is damaged: it has {len(delta)} bytes in place of {start}")


def _words(flat: np.ndarray) -> np.ndarray:
    """uint8 [bytes] as 16-bit words; a last byte alone has a zero beside it."""
    if len(flat) % 2:
        flat = np.append(flat, np.uint8(0))
    return flat.view("<u2")
