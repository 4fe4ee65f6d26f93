"""Reads the header of a GGUF file: its metadata, and where each tensor is. No weights are read.

The format is llama.cpp's (its docs/gguf.md), versions 2 and 3, little-endian:

    magic "GGUF"   version u32   tensors u64   keys u64
    for each key       name, type u32, value
    for each tensor    name, dimensions u32, sizes u64 (the fastest first), type u32, offset u64
    padding to `general.alignment`, then the tensors

A string is its length u64 and its UTF-8 bytes; an array its type u32, its length u64 and its values.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from treepo.errors import ModelError

Value = int | float | bool | str | list[int] | list[float] | list[bool] | list[str]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = dict(
    zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True)
)  # numbers of types, struct's letters
_STRING, _ARRAY = 8, 9
_LONGEST_NAME = 1 << 16  # a key's by the format; a tensor's has at most 64 bytes
_MOST_DIMENSIONS = 4
_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of the file. shape: as in PyTorch, the slowest dimension first. start: its first byte."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata by key, and tensors by name."""

    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header. Raises ModelError if the file is no GGUF file, is cut off or contradicts itself."""
    try:
        if path.stat().st_size == 0:  # which cannot be mapped
            raise ModelError(f"{path}: an empty file; a GGUF file is needed")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Cursor(path, content).header()
    except OSError as error:
        raise ModelError(f"{path}: it cannot be read: {error.strerror}") from None


class _Cursor:
    """A place in the mapped file, which moves as values are read."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path, self._content, self._at = path, content, 0

    def header(self) -> GgufHeader:
        if self._take(len(_MAGIC)) != _MAGIC:
            raise self._error(f"no GGUF file: it begins with {self._content[:4]!r}")
        version = self._scalar("I")
        if version not in _VERSIONS:
            raise self._error(f"GGUF version {version}; {' and '.join(map(str, _VERSIONS))} are supported")
        tensors, keys = self._count(24), self._count(13)  # a tensor or a key has at least so many bytes
        metadata: dict[str, Value] = {}
        for _ in range(keys):
            name = self._name("a key")
            if name in metadata:
                raise self._error(f"the key {name} is there twice")
            metadata[name] = self._value(name, self._scalar("I"))
        return GgufHeader(metadata, self._tensors(tensors, metadata))

    def _tensors(self, count: int, metadata: Mapping[str, Value]) -> dict[str, GgufTensor]:
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self._name("a tensor's name")
            dimensions = self._scalar("I")
            if name in found or dimensions > _MOST_DIMENSIONS:
                raise self._error(f"the tensor {name} is there twice or has {dimensions} dimensions")
            shape = tuple(reversed([self._scalar("Q") for _ in range(dimensions)]))
            found[name] = shape, self._scalar("I"), self._scalar("Q")
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            raise self._error(f"general.alignment = {alignment!r}; a number of bytes is needed")
        first = -(-self._at // alignment) * alignment
        return {name: self._tensor(name, *where, first) for name, where in found.items()}

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int, first: int) -> GgufTensor:
        try:
            named = GGMLQuantizationType(kind)
            block, block_bytes = GGML_QUANT_SIZES[named]
        except (ValueError, KeyError):
            raise self._error(
                f"the tensor {name} has quantisation {kind}, which gguf does not know"
            ) from None
        if not shape or 0 in shape or shape[-1] % block:
            raise self._error(f"the tensor {name} has shape {list(shape)}, in blocks of {block} {named.name}")
        size = math.prod(shape) // block * block_bytes
        if first + offset + size > len(self._content):
            raise self._error(f"it ends within the tensor {name}; the file is cut off, download it again")
        return GgufTensor(shape, named, first + offset, size)

    def _value(self, key: str, kind: int) -> Value:
        if kind == _STRING:
            return self._string(key)
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise self._error(f"{key} has a value of type {kind}, which GGUF does not have")
        inner = self._scalar("I")
        if inner == _STRING:
            return [self._string(key) for _ in range(self._count(8))]
        if inner not in _SCALARS:
            raise self._error(f"{key} is a list of values of type {inner}; numbers and texts are read")
        values = np.dtype(_SCALARS[inner]).newbyteorder("<")
        return np.frombuffer(self._take(self._count(values.itemsize) * values.itemsize), values).tolist()

    def _count(self, least_bytes: int) -> int:
        """A number of items of at least `least_bytes` each, which the rest of the file can hold."""
        count = self._scalar("Q")
        if count * least_bytes > len(self._content) - self._at:
            raise self._error(
                f"{count} items are announced where {len(self._content) - self._at} bytes follow"
            )
        return count

    def _scalar(self, letter: str) -> int:
        (value,) = struct.unpack("<" + letter, self._take(struct.calcsize("<" + letter)))
        # 1e-5 is written as the nearest float32; its shortest decimal is what was meant.
        return float(str(np.float32(value))) if letter == "f" else value  # type: ignore[return-value]  # a bool or float where the key has one

    def _name(self, what: str) -> str:
        """A text that can stand in a line of an error."""
        name = self._string(what)
        if len(name) > _LONGEST_NAME or not name.isprintable():
            shown = f"{name[:40]!r}{'...' if len(name) > 40 else ''}"
            raise self._error(f"{what} is {shown}; at most {_LONGEST_NAME} printable characters are read")
        return name

    def _string(self, what: str) -> str:
        text = self._take(self._count(1))
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise self._error(f"{what} is no UTF-8 text: {text[:40]!r}") from None

    def _take(self, size: int) -> bytes:
        if size > len(self._content) - self._at:
            raise self._error("the file ends within its header; download it again")
        self._at += size
        return self._content[self._at - size : self._at]

    def _error(self, reason: str) -> ModelError:
        return ModelError(f"{self._path}: {reason}")
