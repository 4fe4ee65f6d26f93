"""Training checkpoints to Hugging Face folders and back, by one process, in bounded memory.

What is in memory at once is one file of what is written (`folder.SHARD_BYTES`, twice while safetensors writes
it; `stored.FILE_BYTES`) and the tensors of one parameter.
"""

import megatron_bridge.quiet  # noqa: F401  # isort: skip  # before anything of Megatron-Core

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_bridge.architecture import Architecture, read_architecture
from megatron_bridge.atomic_folder import new_folder
from megatron_bridge.checkpoint import declare_format
from megatron_bridge.collective import FAILURES, reason
from megatron_bridge.distributed_checkpoint import Stored, TensorReader, stored_parameters, write_tensors
from megatron_bridge.folder import INDEX, SHARD_BYTES, Checkpoint, add_other_files, write_folder
from megatron_bridge.weights import Rule, expand
from treepo.errors import CheckpointError, ModelError
from treepo.training.checkpoint_manifest import (
    HUGGING_FACE,
    TRAINER,
    CheckpointManifest,
    is_checkpoint,
    read_manifest,
)

Progress = Callable[[int, int], None]
"""Called with how many tensors are written, of how many."""


def silent(done: int, total: int) -> None:
    """Show nothing."""


@dataclass(frozen=True, slots=True)
class Converted:
    """what: "Hugging Face folder" or "training checkpoint", of so many tensors and parameters."""

    what: str
    tensors: int
    parameters: int
    dtype: str


def convert(source: Path, target: Path, progress: Progress = silent) -> Converted:
    """A training checkpoint to a Hugging Face folder, a Hugging Face folder to a training checkpoint.

    Raises ModelError where `source` is neither or `target` exists, CheckpointError where the disk refuses.
    """
    if target.exists():
        raise ModelError(f"{target} exists: nothing is overwritten")
    try:
        if is_checkpoint(source):
            return to_hugging_face(source, target, progress)
        return to_checkpoint(source, target, progress)
    except FAILURES as error:
        raise CheckpointError(f"{target}: {reason(error)}") from None


def to_hugging_face(
    source: Path,
    target: Path,
    progress: Progress = silent,
    shard_bytes: int = SHARD_BYTES,
) -> Converted:
    """The weights of a training checkpoint, of any layout, with its config and tokenizer."""
    manifest = read_manifest(source)
    architecture = read_architecture(source / HUGGING_FACE)
    stored = stored_parameters(architecture)
    reader = TensorReader(source / TRAINER)
    rules = _rules(architecture)
    total = sum(len(rule.tensors) for rule in rules)
    count = parameters = 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal count, parameters
        for rule in rules:
            whole = torch.cat([reader.read(each.key) for each in stored[rule.parameter]])
            for named in zip(rule.tensors, rule.surgery.join([whole], architecture.dimensions), strict=True):
                yield named
                count += 1
                parameters += named[1].numel()
                progress(count, total)

    write_folder(tensors(), source / HUGGING_FACE, target, shard_bytes)
    return Converted("Hugging Face folder", count, parameters, manifest.dtype)


def to_checkpoint(source: Path, target: Path, progress: Progress = silent) -> Converted:
    """The weights of a Hugging Face folder, for any layout; there is no optimizer's state."""
    _check_hugging_face(source)
    architecture = read_architecture(source)
    weights = Checkpoint(source)
    places = _places(architecture)
    dtype = weights.read("model.embed_tokens.weight").dtype
    count = parameters = 0

    def make(key: str) -> Tensor:
        nonlocal count, parameters
        rule, stored, first_row = places[key]
        (whole,) = rule.surgery.split(
            [weights.read(name) for name in rule.tensors], 1, architecture.dimensions
        )
        rows = whole[first_row : first_row + stored.shape[0]]
        if rows.shape != stored.shape or rows.dtype != dtype:
            raise ModelError(
                f"{source}: {' + '.join(rule.tensors)} give {rows.dtype} {tuple(rows.shape)} for {key}, "
                f"which needs {dtype} {tuple(stored.shape)}"
            )
        count += 1
        parameters += rows.numel()
        progress(count, len(places))
        return rows

    with new_folder(target) as partial:
        (partial / TRAINER).mkdir()
        (partial / HUGGING_FACE).mkdir()
        name = str(dtype).removeprefix("torch.")
        add_other_files(source, partial / HUGGING_FACE, name)
        CheckpointManifest(name, has_optimizer=False, optimizer_steps=0, layout={}).write(partial)
        declare_format(partial / TRAINER)
        shapes = {key: (stored.shape, dtype) for key, (_, stored, _) in places.items()}
        write_tensors(partial / TRAINER, shapes, make)
    return Converted("training checkpoint", count, parameters, name)


def _check_hugging_face(source: Path) -> None:
    if not source.is_dir():
        raise ModelError(f"{source}: no such folder")
    if (source / INDEX).is_file() or (source / "model.safetensors").is_file():
        return
    if checkpoints := sorted(source.glob("checkpoints/step-*"), key=lambda path: (len(path.name), path.name)):
        raise ModelError(f"{source}: a run's folder; its newest checkpoint is {checkpoints[-1]}")
    raise ModelError(
        f"{source}: neither a training checkpoint (checkpoint.json) nor a Hugging Face folder "
        "(config.json and safetensors)"
    )


def _rules(architecture: Architecture) -> list[Rule]:
    rules = expand(architecture.family.rules, architecture.dimensions)
    return [rule for rule in rules if not architecture.tied or rule.parameter != "output_layer.weight"]


def _places(architecture: Architecture) -> dict[str, tuple[Rule, Stored, int]]:
    """For each tensor of a checkpoint its rule, itself, and its first row in the rule's parameter."""
    stored = stored_parameters(architecture)
    places: dict[str, tuple[Rule, Stored, int]] = {}
    for rule in _rules(architecture):
        row = 0
        for each in stored[rule.parameter]:
            places[each.key] = rule, each, row
            row += each.shape[0]
    return places
