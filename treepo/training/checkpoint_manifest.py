"""The folder of a training checkpoint.

    checkpoint.json    the manifest: layout and dtype, optimizer steps, and the run's own state
    trainer/           Megatron-Core's distributed checkpoint (torch_dist): weights, optimizer, generators
    hugging_face/      config, tokenizer and generation config of the model
    ready_trees.jsonl  finished trees that no step has taken or counted (treepo.training.ready_trees)

A checkpoint that was converted from a model folder has weights only: no optimizer, no layout, no trees.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import orjson
from pydantic import ConfigDict, TypeAdapter, ValidationError

from treepo.errors import ModelError, one_line, shortened, shown

MANIFEST, TRAINER, HUGGING_FACE = "checkpoint.json", "trainer", "hugging_face"
READY_TREES = "ready_trees.jsonl"
NAME = re.compile(r"step-(\d{1,18})")
"""The name of a checkpoint's folder in a run."""
_FORMAT = 2


@dataclass(frozen=True, slots=True)
class CheckpointManifest:
    """The content of checkpoint.json.

    dtype: of the weights. optimizer_steps: taken so far. layout: `trainer.parallel` of the ranks that wrote
    it; empty for weights alone. run: the state from which `treepo train` resumes. files: the sizes in bytes
    of all other files, by path in the folder.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    dtype: str
    has_optimizer: bool
    optimizer_steps: int
    layout: Mapping[str, int | bool]
    run: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, int] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write it into the folder of a checkpoint whose other files are complete, and record their sizes."""
        files = {
            file.relative_to(folder).as_posix(): file.stat().st_size
            for file in sorted(folder.rglob("*"))
            if file.is_file() and file != folder / MANIFEST
        }
        content = {"format": _FORMAT} | asdict(replace(self, files=files))
        (folder / MANIFEST).write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2))

    @classmethod
    def of_json(cls, content: bytes) -> Self:
        """Raises ValueError if the content is not a manifest of this version."""
        values = orjson.loads(content)
        version = values.pop("format", None) if isinstance(values, dict) else None
        if version != _FORMAT:
            raise ValueError(f"format {shown(version)}; this version reads {_FORMAT}")
        return TypeAdapter(cls).validate_json(orjson.dumps(values))  # strict types need JSON


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder is a training checkpoint, of any version."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> CheckpointManifest:
    """Read checkpoint.json.

    Raises ModelError if the folder is not a whole training checkpoint of this version; the text names the
    first file that is missing or has another size, and the newest whole checkpoint beside the folder.
    """
    try:
        return _read(folder)
    except ModelError as error:
        whole = _newest_whole(folder)
        if whole is None:
            raise
        raise ModelError(
            f"{error}; {whole.name} beside it is whole: --resume continues from it once {folder.name} is gone"
        ) from None


def _read(folder: Path) -> CheckpointManifest:
    path = folder / MANIFEST
    if not is_checkpoint(folder):
        raise ModelError(f"{folder}: no training checkpoint (it has no {MANIFEST})")
    try:
        manifest = CheckpointManifest.of_json(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: not readable: {error.strerror}") from None
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        raise ModelError(f"{path}: not readable: {shortened(key)}: {one_line(fault['msg'])}") from None
    except ValueError as error:
        raise ModelError(f"{path}: not readable: {one_line(error)}") from None
    for name, size in manifest.files.items():
        file = folder / shortened(name, 300)
        try:
            found = file.stat().st_size
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else one_line(error)
            raise ModelError(f"{file}: not readable: {reason}") from None
        if found != size:
            raise ModelError(f"{file} has {found} bytes, and had {size} when the checkpoint was written")
    return manifest


def _newest_whole(folder: Path) -> Path | None:
    """The newest whole checkpoint of the same run that is older than `folder`."""
    this = NAME.fullmatch(folder.name)
    if this is None:
        return None
    named = ((NAME.fullmatch(entry.name), entry) for entry in folder.parent.glob("step-*"))
    older = [(int(match[1]), entry) for match, entry in named if match and int(match[1]) < int(this[1])]
    for _, entry in sorted(older, reverse=True):
        try:
            _read(entry)
        except ModelError:
            continue
        return entry
    return None
