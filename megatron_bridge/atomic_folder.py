"""Folders that are there complete or not at all: written under a hidden name, and renamed at the end."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Where to write; the block's end makes it `folder`, an error in the block makes it nothing."""
    partial = start_folder(folder)
    try:
        yield partial
        commit_folder(folder)
    except BaseException:
        discard_folder(folder)
        raise


def partial_folder(folder: Path) -> Path:
    """Where the files of `folder` are before they are complete."""
    return folder.with_name(f".{folder.name}.partial")


def start_folder(folder: Path) -> Path:
    """Make the empty partial folder; what a killed process left there goes."""
    partial = partial_folder(folder)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def commit_folder(folder: Path) -> None:
    """Give the partial folder its name, once everything in it has reached the disk."""
    partial = partial_folder(folder)
    for place, _, names in os.walk(partial):
        for name in names:
            _sync(Path(place) / name)
        _sync(Path(place))
    partial.rename(folder)
    _sync(folder.parent)


def discard_folder(folder: Path) -> None:
    """Free the disk of a partial folder that will not be completed."""
    shutil.rmtree(partial_folder(folder), ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
