"""Makes folders that appear complete or not at all: written under a hidden name, renamed at the end."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from treepo.errors import one_line

WRITE_FAILURES = (OSError, SafetensorError)
"""The exceptions of a failed write."""


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write into. It becomes `folder` when the body ends, and is removed if the body
    raises.
    """
    partial = begin_folder(folder)
    try:
        yield partial
        commit_folder(folder)
    except BaseException:
        abort_folder(folder)
        raise


def partial_folder(folder: Path) -> Path:
    """The hidden folder that holds the files of `folder` until they are complete."""
    return folder.with_name(f".{folder.name}.partial")


def begin_folder(folder: Path) -> Path:
    """Make the empty partial folder; remove what a killed process left in its place."""
    partial = partial_folder(folder)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def commit_folder(folder: Path) -> None:
    """Rename the partial folder to `folder`, once all of its files have reached the disk."""
    partial = partial_folder(folder)
    for place, _, names in os.walk(partial):
        for name in names:
            _sync(Path(place) / name)
        _sync(Path(place))
    partial.rename(folder)
    try:
        _sync(folder.parent)
    except OSError:
        folder.rename(partial)  # it may not outlive a power cut, so it is to be written again
        raise


def abort_folder(folder: Path) -> None:
    """Remove the partial folder, which frees its disk space."""
    shutil.rmtree(partial_folder(folder), ignore_errors=True)


def split_into_files[Item](
    items: Iterable[Item], size: Callable[[Item], int], limit: int
) -> Iterator[list[Item]]:
    """Group consecutive items into files of at most `limit` bytes. A larger item is a file of its own."""
    group: list[Item] = []
    used = 0
    for item in items:
        if group and used + size(item) > limit:
            yield group
            group, used = [], 0
        group.append(item)
        used += size(item)
    if group:
        yield group


def reason_and_file(error: BaseException) -> str:
    """The error's reason and file, in one line."""
    if isinstance(error, OSError) and error.strerror:
        name = error.filename2 or error.filename  # filename2: a copy's target
        return f"{error.strerror}: {name}" if name else error.strerror
    return one_line(error)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
