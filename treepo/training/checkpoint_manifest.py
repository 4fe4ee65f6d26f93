"""The folder of a training checkpoint.

    checkpoint.json    the manifest: layout and dtype, optimizer steps, and the run's own state
    trainer/           Megatron-Core's distributed checkpoint (torch_dist): weights, optimizer, generators
    hugging_face/      config, tokenizer and generation config of the model

A checkpoint that was converted from a model folder has weights only: no optimizer, no layout.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from treepo.errors import ModelError

MANIFEST, TRAINER, HUGGING_FACE = "checkpoint.json", "trainer", "hugging_face"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class CheckpointManifest:
    """The content of checkpoint.json.

    dtype: of the weights. optimizer_steps: taken so far. layout: `trainer.parallel` of the ranks that wrote
    it; empty for weights alone. run: the state from which `treepo train` resumes.
    """

    dtype: str
    has_optimizer: bool
    optimizer_steps: int
    layout: Mapping[str, int]
    run: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        content = {"format": _FORMAT} | asdict(self)
        (folder / MANIFEST).write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2))


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder is a training checkpoint, of any version."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> CheckpointManifest:
    """Read checkpoint.json. Raises ModelError if the folder is not a training checkpoint of this version."""
    if not is_checkpoint(folder):
        raise ModelError(f"{folder}: no training checkpoint (it has no {MANIFEST})")
    try:
        content = orjson.loads((folder / MANIFEST).read_bytes())
        version = content.pop("format")
        if version != _FORMAT:
            raise ModelError(f"{folder / MANIFEST}: format {version}; this version reads {_FORMAT}")
        return CheckpointManifest(**content)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{folder / MANIFEST}: not readable: {error}") from None
