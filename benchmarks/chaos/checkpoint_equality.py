"""Compares two training checkpoints bit for bit: weights, master weights, Adam's averages, step counts,
random generators, and the part of the run's state that a deterministic loop determines.

    python -m benchmarks.chaos.checkpoint_equality RUN/checkpoints/step-00004 OTHER/checkpoints/step-00004

prints one line for each difference and exits with 1 if there is any.

Equal trainers need the same trees, at the same layout. Two runs on a CPU sample the same tokens, but SGLang
rounds log-probs by what else is in a batch (1e-6). `learning.importance.mode=none` keeps that rounding out of
the loss; a sampling policy that reads log-probs must not be used. What differs between any two runs is not
compared: seconds, file sizes, and the largest log-prob difference.
"""

import megatron_bridge.runtime  # noqa: F401  # isort: skip  # before anything of Megatron-Core

import sys
from pathlib import Path

import torch
from torch import Tensor

from megatron_bridge.distributed_checkpoint import DistributedCheckpointReader
from treepo.training.checkpoint_manifest import TRAINER, CheckpointManifest, read_manifest

NEVER_EQUAL = ("seconds", "phase_seconds", "sizes", "max_logprob_difference")


def differences(one: Path, other: Path) -> list[str]:
    """Describe each difference between two checkpoints in one line; an empty list means that they are equal.

    Raises ModelError if a folder is no checkpoint.
    """
    manifests = read_manifest(one), read_manifest(other)
    return [*_of_manifests(*manifests), *_of_tensors(one / TRAINER, other / TRAINER)]


def _of_manifests(one: CheckpointManifest, other: CheckpointManifest) -> list[str]:
    found = []
    for name in ("dtype", "has_optimizer", "optimizer_steps", "layout"):
        mine, theirs = getattr(one, name), getattr(other, name)
        if mine != theirs:
            found.append(f"{name}: {mine!r} and {theirs!r}")
    for name in sorted(one.run.keys() | other.run.keys()):
        mine, theirs = one.run.get(name), other.run.get(name)
        if name not in NEVER_EQUAL and mine != theirs:
            found.append(f"run.{name}: {mine!r} and {theirs!r}")
    return found


def _of_tensors(one: Path, other: Path) -> list[str]:
    mine, theirs = DistributedCheckpointReader(one), DistributedCheckpointReader(other)
    found = [f"{key}: only in one of the checkpoints" for key in sorted(mine.keys() ^ theirs.keys())]
    for key in sorted(mine.keys() & theirs.keys()):
        line = _of_values(mine.read_any(key), theirs.read_any(key))
        found += [f"{key}: {line}"] if line else []
    return found


def _of_values(one: Tensor | bytes, other: Tensor | bytes) -> str:
    """What differs between two values; empty if nothing does. NaN equals NaN of the same bits."""
    if isinstance(one, bytes) or isinstance(other, bytes):
        return "" if one == other else "other bytes"
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return f"{one.dtype} {tuple(one.shape)} and {other.dtype} {tuple(other.shape)}"
    bits = [tensor.contiguous().flatten().view(torch.uint8).view(-1, one.itemsize) for tensor in (one, other)]
    unequal = (bits[0] != bits[1]).any(dim=1)
    if not unequal.any():
        return ""
    largest = (one.double() - other.double()).abs().max().item()
    return f"{int(unequal.sum())} of {one.numel()} values differ, by {largest:.1e} at most"


if __name__ == "__main__":
    lines = differences(Path(sys.argv[1]), Path(sys.argv[2]))
    print("\n".join(lines) or "equal")  # noqa: T201 - the result
    sys.exit(bool(lines))
