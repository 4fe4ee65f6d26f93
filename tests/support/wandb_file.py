"""Reads the file that W&B writes offline: records in LevelDB's log format, each a protocol buffer."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEADER = 32768, 7  # bytes
_WHOLE, _LAST = 1, 4  # kinds of parts after which a record is complete


def records(folder: Path) -> Iterator[Any]:
    """The records of the run in `folder`, an offline-run-... folder."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[reportAttributeAccessIssue]  # generated code

    (path,) = folder.glob("*.wandb")
    content, position, parts = path.read_bytes(), _HEADER, b""
    while position + _HEADER <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, position)
        position += _HEADER
        parts += content[position : position + size]
        position += size
        if kind in (_WHOLE, _LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def history(folder: Path) -> dict[int, dict[str, Any]]:
    """The numbers of each step, and the parts of its tables by dotted name."""
    steps: dict[int, dict[str, Any]] = {}
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            assert record.history.step.num not in steps, "a step twice"
            steps[record.history.step.num] = {name: json.loads(text) for name, text in items.items()}
    return steps
