"""Columns of a pack reach the device as they are."""

import numpy as np
import pytest
import torch

from megatron_bridge.schedule import to_device


@pytest.mark.parametrize("length", [1, 3, 64])
def test_arrays_arrive_in_one_transfer_unchanged(length: int) -> None:
    """Odd lengths, read-only and strided arrays, every type of a pack, one of them empty."""
    rng = np.random.default_rng(0)
    arrays = {
        "narrow": rng.integers(0, 9, length).astype(np.int32),
        "wide": rng.normal(size=length),
        "strided": rng.normal(size=2 * length).astype(np.float32)[::2],
        "empty": np.flatnonzero(np.zeros(length)),
    }
    for array in arrays.values():
        array.flags.writeable = False
    moved = to_device(arrays, torch.device("cpu"))
    assert moved.keys() == arrays.keys()
    for name, array in arrays.items():
        assert moved[name].numpy().dtype == array.dtype
        assert np.array_equal(moved[name].numpy(), array)
    assert len({tensor.untyped_storage().data_ptr() for tensor in moved.values()}) == 1
