"""Changes an input a little: bytes, lines, and the values of a JSON document."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

MOST_BYTES = 1 << 16
"""Longest input. Longer ones are cases of the readers' own tests."""

_BYTES = (
    b"\x00",
    b"\r",
    b"\n",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\x1b]8;;",
    b"\xe2\x80\xae",
    b"[" * 2000,
    b'{"a":' * 1200,
    b"9" * 5000,
    b"1e999",
    b"-1",
    b"NaN",
    b"Infinity",
    b"null",
    b'"',
    b"'",
    b"\\",
    b"\\ud800",
    b"../../etc/passwd",
    b"/dev/zero",
)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**4000, 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), "", " ", "a", "\ud800", "\x00", "\x1b[31m", "a" * 300, "../x", "/dev/zero"),
    *([], {}, [[]], {"": None}, [None], "NaN", "1e999", "٣", "²", [0] * 50),
)

Mutation = Callable[[bytes, random.Random, Sequence[bytes]], bytes]


def mutated(data: bytes, corpus: Sequence[bytes], words: Sequence[bytes], draw: random.Random) -> bytes:
    """One to a few changes of `data`. words: that the reader knows. corpus: to join pieces from."""
    for _ in range(1 + min(int(draw.expovariate(0.8)), 6)):
        data = (
            draw.choice(_MUTATIONS)(data, draw, words) if draw.random() < 0.9 else _splice(data, corpus, draw)
        )
    return data[:MOST_BYTES]


def _splice(data: bytes, corpus: Sequence[bytes], draw: random.Random) -> bytes:
    other = draw.choice(corpus)
    return data[: draw.randint(0, len(data))] + other[draw.randint(0, len(other)) :]


def _flip(data: bytes, draw: random.Random, _: Sequence[bytes]) -> bytes:
    if not data:
        return b"\x01"
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]


def _number(data: bytes, draw: random.Random, _: Sequence[bytes]) -> bytes:
    """Overwrite a little-endian number, as the lengths in binary headers are."""
    size = draw.choice((1, 2, 4, 8))
    value = draw.choice((0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), draw.getrandbits(8 * size)))
    at = draw.randint(0, max(len(data) - size, 0))
    return data[:at] + value.to_bytes(size, "little") + data[at + size :]


def _insert(data: bytes, draw: random.Random, words: Sequence[bytes]) -> bytes:
    known = words if words and draw.random() < 0.5 else _BYTES
    at = draw.randint(0, len(data))
    return data[:at] + draw.choice(known) + data[at:]


def _piece(data: bytes, draw: random.Random) -> tuple[int, int]:
    start = draw.randint(0, len(data))
    return start, min(start + int(draw.expovariate(0.05)), len(data))


def _delete(data: bytes, draw: random.Random, _: Sequence[bytes]) -> bytes:
    start, stop = _piece(data, draw)
    return data[:start] + data[stop:]


def _repeat(data: bytes, draw: random.Random, _: Sequence[bytes]) -> bytes:
    start, stop = _piece(data, draw)
    return data[:stop] + data[start:stop] * draw.randint(1, 8) + data[stop:]


def _lines(data: bytes, draw: random.Random, _: Sequence[bytes]) -> bytes:
    """Drop, double or move a line."""
    lines = data.split(b"\n")
    line = lines.pop(draw.randrange(len(lines)))
    for _copy in range(draw.randint(0, 2)):
        lines.insert(draw.randint(0, len(lines)), line)
    return b"\n".join(lines)


def _json_value(data: bytes, draw: random.Random, words: Sequence[bytes]) -> bytes:
    """Replace, drop or rename a value of one JSON document in the data: the whole, or one of its lines."""
    lines = data.split(b"\n")
    at = draw.randrange(len(lines))
    whole = len(lines) == 1 or draw.random() < 0.3
    try:
        value = json.loads(data if whole else lines[at])
        changed = json.dumps(_changed(value, draw, words)).encode()
    except (ValueError, RecursionError):
        return _flip(data, draw, words)
    if whole:
        return changed
    lines[at] = changed
    return b"\n".join(lines)


def _changed(value: Any, draw: random.Random, words: Sequence[bytes]) -> Any:
    places = list(_places(value))
    if not places:
        return draw.choice(_VALUES)
    holder, key = draw.choice(places)
    match draw.randrange(5):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            name = draw.choice(words).decode("utf-8", "replace") if words else ""
            holder[name] = holder.pop(key)
        case 2:
            other, place = draw.choice(places)
            holder[key] = json.loads(json.dumps(other[place]))
        case 3 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = draw.choice((holder[key] + 1, holder[key] - 1, -holder[key], str(holder[key])))
        case _:
            holder[key] = draw.choice(_VALUES)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every list or object in the value, with each of its keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield value, key
        yield from _places(below)


_MUTATIONS: tuple[Mutation, ...] = (
    *(_flip, _number, _insert, _delete, _repeat, _lines),
    *(_json_value,) * 4,
)
