"""What may happen to the files of a checkpoint."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from treepo.training.checkpoint_manifest import MANIFEST

Damage = Callable[[Path], object]
"""Damages the checkpoint in a folder."""


def flip_bit(path: Path, position: int = 4, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def as_earlier_version(folder: Path, **values: object) -> None:
    """Write the manifest in the format without checksums. values: change others."""
    content = json.loads((folder / MANIFEST).read_bytes())
    del content["checksums"], content["checksum"]
    (folder / MANIFEST).write_text(json.dumps(content | {"format": 2} | values))


def damages(file: str) -> dict[str, tuple[Damage, str]]:
    """Damages by name, and what the error of each says. file: of at least 5 bytes, by path in the folder."""
    return {
        "truncated": (lambda folder: os.truncate(folder / file, 3), f"{file} has 3 bytes, and had "),
        "emptied": (lambda folder: os.truncate(folder / file, 0), f"{file} has 0 bytes, and had "),
        "removed": (lambda folder: (folder / file).unlink(), f"{file}: not readable: No such file"),
        "flipped": (lambda folder: flip_bit(folder / file), f"{file} has another content than when"),
        "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "no training checkpoint"),
        "half a manifest": (lambda folder: os.truncate(folder / MANIFEST, 50), f"{MANIFEST}: not readable"),
        "changed manifest": (_count_a_step, f"{MANIFEST}: not readable: it was changed"),
    }


def _count_a_step(folder: Path) -> None:
    content = json.loads((folder / MANIFEST).read_bytes())
    content["optimizer_steps"] += 1
    (folder / MANIFEST).write_text(json.dumps(content))
