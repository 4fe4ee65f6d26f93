"""The folder of a training checkpoint.

    checkpoint.json    the manifest: layout and dtype, optimizer steps, the run's own state, and the sizes
                       and checksums of all other files
    trainer/           Megatron-Core's distributed checkpoint (torch_dist): weights, optimizer, generators
    hugging_face/      config, tokenizer and generation config of the model
    ready_trees.jsonl  finished trees that no step has taken or counted (treepo.training.ready_trees)

A checkpoint of adapters has those and their optimizer state instead of the model's weights, which stay in
the model's folder. One that was converted from a model folder has weights only: no optimizer, no layout, no
trees.
"""

import errno
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Self

import orjson
import xxhash
from pydantic import ConfigDict, TypeAdapter, ValidationError

from treepo.config.trainer import LoraConfig
from treepo.data.fingerprint import model_fingerprint
from treepo.errors import ModelError, one_line, shortened, shown

MANIFEST, TRAINER, HUGGING_FACE = "checkpoint.json", "trainer", "hugging_face"
READY_TREES = "ready_trees.jsonl"
NAME = re.compile(r"step-(\d{1,18})")
"""The name of a checkpoint's folder in a run."""
_FORMAT = 3
_PIECE = 1 << 24  # bytes that are read at once
_WITHOUT_CHECKSUMS = 2
"""An earlier format, which is still read."""
_READERS = 8  # files that are read at once


class OtherFormatError(ModelError):
    """A checkpoint of another version of treepo, which is not damaged."""


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """What a checkpoint of adapters has in place of the model's weights: `trainer.lora`, and the folder of
    the model that they are beside, with its fingerprint (`treepo.data.fingerprint`).
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    rank: int
    alpha: float
    targets: tuple[str, ...]
    base: str
    fingerprint: str

    @classmethod
    def of(cls, lora: LoraConfig, model: Path) -> Self:
        """Reads blocks of the model's weight files."""
        targets = tuple(lora.targets)
        return cls(lora.rank, lora.alpha, targets, str(model.resolve()), model_fingerprint(model))

    @property
    def lora(self) -> LoraConfig:
        """Raises ModelError if no configuration has these values."""
        try:
            return LoraConfig.model_validate(
                {"rank": self.rank, "alpha": self.alpha, "targets": list(self.targets)}
            )
        except ValidationError as error:
            raise ModelError(f"{MANIFEST}: adapters: {one_line(error.errors()[0]['msg'])}") from None

    def check_base(self, model: Path, checkpoint: Path) -> None:
        """Raise ModelError unless `model` holds the weights that the adapters were trained beside."""
        if not model.is_dir():
            raise ModelError(
                f"{checkpoint}: its adapters belong to the model in {model}, which is not on this machine"
            )
        if (found := model_fingerprint(model)) != self.fingerprint:
            raise ModelError(
                f"{checkpoint}: its adapters were trained beside other weights than those in {model} "
                f"(fingerprint {self.fingerprint}, now {found})"
            )


@dataclass(frozen=True, slots=True)
class CheckpointManifest:
    """The content of checkpoint.json.

    dtype: of the weights. optimizer_steps: taken so far. layout: `trainer.parallel` of the ranks that wrote
    it; empty for weights alone. run: the state from which `treepo train` resumes. files: the sizes in bytes
    of all other files, by path in the folder. checksums: theirs; empty in a checkpoint of an earlier version.
    adapters: if the checkpoint has those alone.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    dtype: str
    has_optimizer: bool
    optimizer_steps: int
    layout: Mapping[str, int | bool]
    run: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, int] = field(default_factory=dict)
    checksums: Mapping[str, str] = field(default_factory=dict)
    adapters: AdapterManifest | None = None

    def write(self, folder: Path, checksums: Mapping[str, str] | None = None) -> dict[str, str]:
        """Write it into the folder of a checkpoint whose other files are complete, with their sizes and
        checksums. Returns the checksums of all files, its own too.

        checksums: of some files, by path, which need not be read for it. Raises OSError, also if one of those
        is not there.
        """
        known = checksums or {}
        files = {
            file.relative_to(folder).as_posix(): file.stat().st_size
            for file in sorted(folder.rglob("*"))
            if file.is_file() and file != folder / MANIFEST
        }
        if missing := sorted(known.keys() - files.keys()):
            unseen = "another rank wrote it, and this one does not see it; all ranks need one file system"
            raise FileNotFoundError(errno.ENOENT, unseen, str(folder / missing[0]))
        sums = {name: known.get(name) or checksum(folder / name) for name in files}
        content = {"format": _FORMAT} | asdict(replace(self, files=files, checksums=sums))
        if self.adapters is None:
            del content["adapters"]  # earlier versions do not know it
        lines = orjson.dumps(content | {"checksum": _of_content(content)}, option=orjson.OPT_INDENT_2)
        (folder / MANIFEST).write_bytes(lines)
        return sums | {MANIFEST: xxhash.xxh3_128(lines).hexdigest()}

    @classmethod
    def of_json(cls, content: bytes) -> Self:
        """Raises ValueError if the content is not a manifest or was changed, and OtherFormatError."""
        values = orjson.loads(content)
        version = values.get("format") if isinstance(values, dict) else None
        if version not in (_FORMAT, _WITHOUT_CHECKSUMS):
            text = f"format {shown(version)}; this version reads {_WITHOUT_CHECKSUMS} and {_FORMAT}"
            raise OtherFormatError(text) if type(version) is int else ValueError(text)
        if version == _FORMAT and values.pop("checksum", None) != _of_content(values):
            raise ValueError("it was changed: it does not have the checksum that is written in it")
        del values["format"]
        manifest = TypeAdapter(cls).validate_json(orjson.dumps(values))  # strict types need JSON
        for name in (*manifest.files, *manifest.checksums):
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"files: {shown(name)} is not in the folder")
        return manifest


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder is a training checkpoint, of any version."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> CheckpointManifest:
    """Read checkpoint.json, and compare the sizes of the other files.

    Raises ModelError if the folder is not a whole training checkpoint; the text names the first file that is
    missing or has another size. Raises OtherFormatError if another version of treepo wrote it.
    """
    path = folder / MANIFEST
    if not is_checkpoint(folder):
        raise ModelError(f"{folder}: no training checkpoint (it has no {MANIFEST})")
    try:
        manifest = CheckpointManifest.of_json(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: not readable: {error.strerror}") from None
    except OtherFormatError as error:
        raise OtherFormatError(f"{path}: not readable: {error}") from None
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


def verified_manifest(folder: Path) -> CheckpointManifest:
    """As `read_manifest`; also reads all files and compares their checksums."""
    manifest = read_manifest(folder)
    check_files(folder, manifest.checksums)
    return manifest


def check_files(folder: Path, checksums: Mapping[str, str]) -> None:
    """Raise ModelError if a file's content has another checksum. checksums: by path in the folder."""

    def fault(name: str) -> str | None:
        try:
            found = checksum(folder / name)
        except OSError as error:
            return f"{folder / name}: not readable: {error.strerror}"
        if found == checksums[name]:
            return None
        return (
            f"{folder / name} has another content than when the checkpoint was written (checksum {found}, "
            f"and it was {checksums[name]})"
        )

    with ThreadPoolExecutor(_READERS) as readers:
        for found in readers.map(fault, checksums):
            if found is not None:
                readers.shutdown(wait=False, cancel_futures=True)
                raise ModelError(found)


def checksum(path: Path, read: Callable[[], None] = lambda: None) -> str:
    """The file's XXH3 checksum of 128 bits, in hexadecimal: as fast as memory, against accidents only.

    read: called after each piece.
    """
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            read()
    return digest.hexdigest()


def _of_content(content: Mapping[str, Any]) -> str:
    """The checksum of the manifest itself."""
    return xxhash.xxh3_128(orjson.dumps(content)).hexdigest()
