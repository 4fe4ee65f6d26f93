"""Converts training checkpoints to Hugging Face folders and back, adapters and GGUF files to such folders.

In one process and bounded memory: it holds the tensors of one parameter, and one file while it is written,
`hf_folder.SHARD_BYTES`, which safetensors holds twice, or `distributed_checkpoint.FILE_BYTES`.
"""

import megatron_bridge.runtime  # noqa: F401  # isort: skip  # before anything of Megatron-Core

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from megatron_bridge.adapter_names import adapter_rules
from megatron_bridge.architecture import Architecture, read_architecture, tensor_shapes
from megatron_bridge.atomic_folder import WRITE_FAILURES, atomic_folder, reason_and_file
from megatron_bridge.distributed_checkpoint import (
    CheckpointTensor,
    DistributedCheckpointReader,
    checkpoint_tensors,
    write_distributed_checkpoint,
)
from megatron_bridge.gguf_model import open_gguf
from megatron_bridge.hf_folder import (
    SHARD_BYTES,
    SafetensorsReader,
    copy_model_files,
    write_hf_folder,
)
from megatron_bridge.hf_tensors import check_tensors
from megatron_bridge.hf_weight_map import Rule
from megatron_bridge.peft_folder import is_adapter, merged_tensors, read_adapter, write_adapter
from treepo.data.model_config import CONFIG
from treepo.data.tokenizer import load_tokenizer
from treepo.data.weight_headers import has_weights
from treepo.errors import CheckpointError, ModelError
from treepo.training.checkpoint_manifest import (
    HUGGING_FACE,
    TRAINER,
    AdapterManifest,
    CheckpointManifest,
    is_checkpoint,
    verified_manifest,
)

Progress = Callable[[int, int], None]
"""Called with the number of tensors written so far and the total."""


def silent(done: int, total: int) -> None:
    """A `Progress` that shows nothing."""


@dataclass(frozen=True, slots=True)
class Converted:
    """The result of a conversion. what: "Hugging Face folder" or "training checkpoint"."""

    what: str
    tensors: int
    parameters: int
    dtype: str


def convert(source: Path, target: Path, progress: Progress = silent, *, adapter: bool = False) -> Converted:
    """Convert a checkpoint, an adapter of PEFT or a GGUF file to a Hugging Face folder, or a Hugging Face
    folder to a checkpoint.

    adapter: write the adapters of a checkpoint by themselves, as PEFT's. Raises ModelError if `source` is
    none of these or `target` exists, CheckpointError if `target` cannot be written.
    """
    if target.exists():
        raise ModelError(f"{target} exists: nothing is overwritten")
    try:
        if adapter:
            return to_adapter(source, target)
        if is_adapter(source):
            return from_adapter(source, target, progress)
        if source.is_file():
            return from_gguf(source, target, progress)
        if is_checkpoint(source):
            return to_hugging_face(source, target, progress)
        return to_checkpoint(source, target, progress)
    except WRITE_FAILURES as error:
        raise CheckpointError(f"{target}: {reason_and_file(error)}") from None


def to_hugging_face(
    source: Path,
    target: Path,
    progress: Progress = silent,
    shard_bytes: int = SHARD_BYTES,
) -> Converted:
    """Write the weights of a training checkpoint of any layout, with its config and tokenizer."""
    manifest = verified_manifest(source)
    if manifest.adapters is not None:
        return _merge(source, manifest, manifest.adapters, target, progress, shard_bytes)
    architecture = read_architecture(source / HUGGING_FACE)
    tensors_of = checkpoint_tensors(architecture)
    reader = DistributedCheckpointReader(source / TRAINER)
    rules = architecture.weight_rules()
    total = sum(len(rule.tensors) for rule in rules)
    count = parameters = 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal count, parameters
        for rule in rules:
            whole = torch.cat([reader.read(tensor.key) for tensor in tensors_of[rule.parameter]])
            for named in zip(rule.tensors, rule.surgery.join([whole], architecture.dimensions), strict=True):
                yield named
                count += 1
                parameters += named[1].numel()
                progress(count, total)

    write_hf_folder(tensors(), source / HUGGING_FACE, target, shard_bytes)
    return Converted("Hugging Face folder", count, parameters, manifest.dtype)


def _merge(
    source: Path,
    manifest: CheckpointManifest,
    adapters: AdapterManifest,
    target: Path,
    progress: Progress,
    shard_bytes: int,
) -> Converted:
    """Write the weights that a checkpoint's adapters are beside, with them merged."""
    base, architecture = Path(adapters.base), read_architecture(source / HUGGING_FACE)
    adapters.check_base(base, source)
    matrices = _adapter_tensors(source, architecture, adapters)
    tensors = merged_tensors(base, architecture, adapters.lora, matrices, getattr(torch, manifest.dtype))
    counter = _Counter(progress, len(tensor_shapes(architecture)))
    write_hf_folder(counter.counted(tensors), source / HUGGING_FACE, target, shard_bytes)
    return Converted("Hugging Face folder", counter.tensors, counter.parameters, manifest.dtype)


def to_adapter(source: Path, target: Path) -> Converted:
    """Write the adapters of a training checkpoint as PEFT's folder."""
    manifest = verified_manifest(source) if is_checkpoint(source) else None
    if manifest is None or manifest.adapters is None:
        raise ModelError(f"--adapter: {source} is no training checkpoint with adapters")
    architecture = read_architecture(source / HUGGING_FACE)
    tensors = _adapter_tensors(source, architecture, manifest.adapters)
    with atomic_folder(target) as partial:
        write_adapter(partial, tensors, manifest.adapters.lora, Path(manifest.adapters.base))
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return Converted("PEFT adapter", len(tensors), parameters, manifest.dtype)


def from_adapter(source: Path, target: Path, progress: Progress = silent) -> Converted:
    """Write the base model of an adapter of PEFT with it merged, in the base's dtype."""
    adapter = read_adapter(source)
    check_tensors(adapter.base, adapter.architecture, one_dtype=True)
    tensors = merged_tensors(adapter.base, adapter.architecture, adapter.lora, adapter.tensors(), None)
    counter = _Counter(progress, len(tensor_shapes(adapter.architecture)))
    write_hf_folder(counter.counted(tensors), adapter.base, target)
    return Converted("Hugging Face folder", counter.tensors, counter.parameters, counter.dtype)


def _adapter_tensors(
    source: Path, architecture: Architecture, adapters: AdapterManifest
) -> dict[str, Tensor]:
    """The adapters of a checkpoint by PEFT's names."""
    reader = DistributedCheckpointReader(source / TRAINER)
    rules = adapter_rules(architecture, adapters.lora.targets)
    return {rule.tensors[0]: reader.read(rule.parameter) for rule in rules}


class _Counter:
    """Counts tensors on their way, and shows the progress."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total = progress, total
        self.tensors = self.parameters = 0
        self.dtype = ""

    def counted(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            yield name, tensor
            self.tensors += 1
            self.parameters += tensor.numel()
            self.dtype = str(tensor.dtype).removeprefix("torch.")
            self._progress(self.tensors, self._total)


def from_gguf(source: Path, target: Path, progress: Progress = silent) -> Converted:
    """Write the model of a GGUF file as a Hugging Face folder, in float32."""
    count = parameters = 0
    with TemporaryDirectory(prefix="treepo-convert-") as described:
        model = open_gguf(source, Path(described))
        load_tokenizer(Path(described))

        def tensors() -> Iterator[tuple[str, Tensor]]:
            nonlocal count, parameters
            for named in model.tensors():
                yield named
                count += 1
                parameters += named[1].numel()
                progress(count, model.tensor_count)

        write_hf_folder(tensors(), Path(described), target)
    return Converted("Hugging Face folder", count, parameters, "float32")


def to_checkpoint(source: Path, target: Path, progress: Progress = silent) -> Converted:
    """Write the weights of a Hugging Face folder as a checkpoint for any layout, without optimizer state."""
    _check_hugging_face(source)
    architecture = read_architecture(source)
    check_tensors(source, architecture, one_dtype=True)
    weights = SafetensorsReader(source)
    places = _places(architecture)
    dtype = weights.read("model.embed_tokens.weight").dtype
    count = parameters = 0

    def make(key: str) -> Tensor:
        nonlocal count, parameters
        rule, tensor, first_row = places[key]
        (whole,) = rule.surgery.split(
            [weights.read(name) for name in rule.tensors], 1, architecture.dimensions
        )
        rows = whole[first_row : first_row + tensor.shape[0]]
        assert rows.shape == tensor.shape, (key, rows.shape, tensor.shape)
        count += 1
        parameters += rows.numel()
        progress(count, len(places))
        return rows

    with atomic_folder(target) as partial:
        (partial / TRAINER).mkdir()
        (partial / HUGGING_FACE).mkdir()
        name = str(dtype).removeprefix("torch.")
        copy_model_files(source, partial / HUGGING_FACE, name)
        shapes = {key: (tensor.shape, dtype) for key, (_, tensor, _) in places.items()}
        write_distributed_checkpoint(partial / TRAINER, shapes, make)
        CheckpointManifest(name, has_optimizer=False, optimizer_steps=0, layout={}).write(partial)
    return Converted("training checkpoint", count, parameters, name)


def _check_hugging_face(source: Path) -> None:
    if not source.is_dir():
        raise ModelError(f"{source}: no such file or folder")
    if (source / CONFIG).is_file() or has_weights(source):
        return
    if checkpoints := sorted(source.glob("checkpoints/step-*"), key=lambda path: (len(path.name), path.name)):
        raise ModelError(f"{source} is a run folder; its newest checkpoint is {checkpoints[-1]}")
    raise ModelError(
        f"{source}: neither a training checkpoint (checkpoint.json) nor a Hugging Face folder "
        "(config.json and safetensors)"
    )


def _places(architecture: Architecture) -> dict[str, tuple[Rule, CheckpointTensor, int]]:
    """For each key of a checkpoint its rule, its tensor, and its first row in the rule's parameter."""
    tensors_of = checkpoint_tensors(architecture)
    places: dict[str, tuple[Rule, CheckpointTensor, int]] = {}
    for rule in architecture.weight_rules():
        row = 0
        for tensor in tensors_of[rule.parameter]:
            places[tensor.key] = rule, tensor, row
            row += tensor.shape[0]
    return places
