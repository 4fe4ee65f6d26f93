"""Buckets of weights into a running SGLang, and what must hold before the new version may serve."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from treepo.errors import EngineError, ModelError
from treepo.protocols import Bucket

_NAMED = 5  # names that an error message spells out


def checkpoint_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model folder, from its safetensors' headers."""
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{model}: no *.safetensors in the folder")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - a safetensors file is no mapping
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        except SafetensorError as error:
            raise ModelError(f"{file}: no readable safetensors file: {error}") from error
    return shapes


def check_shapes(bucket: Bucket, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises EngineError for a tensor that the model does not have: SGLang skips an unknown name silently,
    and a wrong shape ends its process.
    """
    for name, shape in zip(bucket.names, bucket.shapes, strict=True):
        if name not in shapes:
            raise EngineError(f"weights: the model has no tensor {name!r}")
        if tuple(shape) != shapes[name]:
            raise EngineError(f"weights: {name} has shape {tuple(shape)}, the model's is {shapes[name]}")


def check_names(arrived: Sequence[str], expected: Sequence[str]) -> None:
    """Raises EngineError unless exactly the expected tensors arrived, each once."""
    faults = []
    if missing := sorted(set(expected) - set(arrived)):
        faults.append(f"{len(missing)} missing: {_spelled(missing)}")
    if unexpected := sorted(set(arrived) - set(expected)):
        faults.append(f"{len(unexpected)} unexpected: {_spelled(unexpected)}")
    if repeated := sorted(name for name, count in Counter(arrived).items() if count > 1):
        faults.append(f"{len(repeated)} repeated: {_spelled(repeated)}")
    if faults:
        raise EngineError(f"weights: of {len(expected)} expected tensors " + "; ".join(faults))


def _spelled(names: Sequence[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def shared_payload(bucket: Bucket) -> dict[str, Any]:
    """SGLang's `flattened_bucket`, its bytes in shared memory: the one copy on this side."""
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorMetadata

    shared = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(bucket.data.nbytes))
    np.copyto(shared.numpy(), bucket.data)
    metadata, start = [], 0
    for name, dtype_name, shape in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
        dtype = getattr(torch, dtype_name)
        end = start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if start % dtype.itemsize:
            raise EngineError(f"weights: {name} starts at byte {start}, no multiple of its {dtype_name}")
        metadata.append(
            FlattenedTensorMetadata(
                name=name,
                shape=torch.Size(shape),
                dtype=dtype,
                start_idx=start,
                end_idx=end,
                numel=end - start,
            )
        )
        start = end
    if start != bucket.data.nbytes:
        raise EngineError(f"weights: a bucket of {bucket.data.nbytes} bytes names tensors of {start} bytes")
    return {"flattened_tensor": shared, "metadata": metadata}
