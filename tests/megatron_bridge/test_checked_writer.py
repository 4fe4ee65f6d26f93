"""The files of a distributed checkpoint are read back from the disk once they are written."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_bridge.checked_writer import CheckedWriter
from tests.support.checkpoint_damage import flip_bit
from treepo.training.checkpoint_manifest import checksum

NAMES = (".metadata", "__0_0.distcp")


def write(folder: Path) -> CheckedWriter:
    writer = CheckedWriter(folder)
    state = {"weights": torch.arange(100_000.0), "small": torch.ones(3), "generators": {"a": 1}}
    save(state, storage_writer=writer, no_dist=True)
    return writer


def test_the_checksums_are_those_of_the_files(tmp_path: Path) -> None:
    """All files, whose bytes pass the checksum on the way to the disk."""
    assert write(tmp_path).checksums == {name: checksum(tmp_path / name) for name in NAMES}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", [lambda path: flip_bit(path, 99, 3), lambda path: os.truncate(path, 50)])
def test_a_disk_that_returns_something_else_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: Callable[[Path], object]
) -> None:
    """The file changes when memory drops it."""
    drop = os.posix_fadvise

    def drop_and_damage(descriptor: int, *arguments: int) -> None:
        drop(descriptor, *arguments)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name == name:
            damage(path)

    monkeypatch.setattr(os, "posix_fadvise", drop_and_damage)
    with pytest.raises((CheckpointException, OSError)) as error:
        write(tmp_path)
    assert f"the disk returns another content than was written: '{tmp_path / name}'" in str(error.value)
